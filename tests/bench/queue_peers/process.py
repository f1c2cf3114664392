"""One system in a process of its own: `python process.py SYSTEM produce|work URL`.

SYSTEM is one of SYSTEMS. `work` runs its worker until it is stopped. `produce` answers lines of JSON on stdin by
lines on stdout:

    (start)                                                         {"versions": {"huey": "3.5.4"}}
    {"enqueue": 100, "texts_per_job": 8, "many": false}             {"seconds": 0.05}
    {"alone": 12}  one job at a time, until its result is here      {"seconds": [0.002, ...]}

Runs in whichever environment has the system; imports nothing of the others.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from importlib.metadata import version
from typing import Any

#: Module, class, and the name of its tuple of packages whose versions matter.
SYSTEMS = {
    "embedq": ("embedq_jobs", "EmbedqJobs", "PACKAGES"),
    "rq-simple": ("rq_jobs", "InProcess", "PACKAGES"),
    "rq-forking": ("rq_jobs", "Forking", "PACKAGES"),
    "huey": ("huey_jobs", "HueyJobs", "PACKAGES"),
    "dramatiq": ("dramatiq_jobs", "DramatiqJobs", "PACKAGES"),
    "arq": ("arq_jobs", "ArqJobs", "PACKAGES"),
    "celery": ("celery_jobs", "CeleryJobs", "PACKAGES"),
    "celery-batches": ("celery_jobs", "BatchesJobs", "BATCHES_PACKAGES"),
}
RESULT_TIMEOUT_S = 30.0
#: Seconds at most before a job for an idle worker: some workers look for jobs each half second only.
LONGEST_PAUSE_S = 0.5
FLOAT32_BYTES = 4


def main() -> None:
    system, role, url = sys.argv[1:]
    module_name, class_name, packages_name = SYSTEMS[system]
    module = importlib.import_module(module_name)
    jobs = getattr(module, class_name)(url)
    if role == "work":
        jobs.work()
        return
    # Libraries print to stdout; answers go to a copy of it.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({"versions": {name: version(name) for name in getattr(module, packages_name)}}), file=answers)
    for line in sys.stdin:
        print(json.dumps({"seconds": answer(jobs, json.loads(line))}), file=answers)


def answer(jobs: Any, request: dict[str, Any]) -> float | list[float]:
    if "alone" in request:
        return [alone_s(jobs, number) for number in range(request["alone"])]
    texts = [[f"text {n} {place}" for place in range(request["texts_per_job"])] for n in range(request["enqueue"])]
    began_at = time.perf_counter()
    if request["many"]:
        jobs.enqueue_many(texts)
    else:
        for some in texts:
            jobs.enqueue(some)
    return time.perf_counter() - began_at


def alone_s(jobs: Any, number: int) -> float:
    """From enqueueing one text to its vector, for an idle worker. Raises ValueError for anything but a vector."""
    time.sleep(random.uniform(0, LONGEST_PAUSE_S))
    began_at = time.perf_counter()
    found = jobs.result(jobs.enqueue([f"text {number}"]), RESULT_TIMEOUT_S)
    took_s = time.perf_counter() - began_at
    if len(found) != 768 * FLOAT32_BYTES:
        raise ValueError(f"a result of {len(found)} bytes")
    return took_s


if __name__ == "__main__":
    main()
