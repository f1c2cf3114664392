"""Commands of many awaiting calls in few round trips: what comes while all connections are busy goes together.

Knows pipelines and scripts of `redis.asyncio`; knows no jobs. A command of many costs half of one alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis
import redis.asyncio

from embedq.producer.connection import BACKOFF, RETRIES, closed
from embedq.producer.scripts import LOADS

#: Connections that all calls share.
MAX_CONNECTIONS = 4
#: Arguments in one round trip, unless one call has more: some 100 jobs of one text.
MAX_ARGUMENTS = 4096

Command = tuple[Any, ...]


class _Question(NamedTuple):
    """One call's commands, and where their replies go."""

    commands: Sequence[Command]
    answer: asyncio.Future[list[Any]]
    #: how often a replica refused them
    num_demotions: int = 0


class RoundTrips:
    """For the calls of one event loop. A call that is canceled leaves its commands to take effect or not."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis: Any = client
        self._num_busy = 0
        self._waiting: deque[_Question] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        #: Set when nothing is under way.
        self._is_quiet = asyncio.Event()
        self._loading = asyncio.Lock()
        #: by the script's hash
        self._num_loads: Counter[str] = Counter()

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The replies. Raises redis.RedisError, also for one command that Redis refuses; once closed
        QueueConnectionError.
        """
        if self._is_closed:
            raise closed()
        # Never in the caller's own task: redis-py's timeouts may swallow its cancellation (see `tasks`).
        question = _Question(commands, asyncio.get_running_loop().create_future())
        self._waiting.append(question)
        if self._num_busy < MAX_CONNECTIONS:
            self._start_turn()
        replies = await question.answer
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def run(self, script: Any, script_keys: Sequence[str], args: Sequence[Any]) -> Any:
        """One call of a script of `scripts.load`. Raises redis.RedisError."""
        command = ("EVALSHA", script.sha, len(script_keys), *script_keys, *args)
        for _ in range(LOADS):
            num_loads = self._num_loads[script.sha]
            try:
                return (await self.ask([command]))[0]
            except redis.exceptions.NoScriptError:
                await self._load(script, num_loads)
        return (await self.ask([command]))[0]

    async def close(self) -> None:
        """Lets what is under way end; calls that still wait for their turn raise QueueConnectionError."""
        self._is_closed = True
        while self._waiting:
            answer = self._waiting.popleft().answer
            if not answer.done():
                answer.set_exception(closed())
        if self._num_busy:
            self._is_quiet.clear()
            await self._is_quiet.wait()

    async def _load(self, script: Any, num_loads: int) -> None:
        """Loads a script, unless one was since `num_loads`: thousands of calls may miss it at once."""
        async with self._loading:
            if self._num_loads[script.sha] == num_loads:
                await self.ask([("SCRIPT LOAD", script.script)])
                self._num_loads[script.sha] += 1

    async def _go(self, commands: Sequence[Command]) -> list[Any]:
        """One round trip."""
        if len(commands) == 1:
            return [await self._redis.execute_command(*commands[0])]
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute(raise_on_error=False))

    def _start_turn(self) -> None:
        self._num_busy += 1
        task = asyncio.create_task(self._answer_all(self._next_batch()), name="embedq round trips")
        self._tasks.add(task)
        task.add_done_callback(self._end_turn)

    def _end_turn(self, task: asyncio.Task[None]) -> None:
        """A connection is free: it goes to those who wait, if any."""
        self._tasks.discard(task)
        self._num_busy -= 1
        if self._waiting:
            self._start_turn()
        elif not self._num_busy:
            self._is_quiet.set()

    async def _answer_all(self, batch: list[_Question]) -> None:
        """This batch, and what waits when it is done."""
        while batch:
            again: list[_Question] = []
            try:
                replies = await self._go([command for question in batch for command in question.commands])
                again = self._answer(batch, replies)
                if again:
                    await asyncio.sleep(BACKOFF.compute(again[0].num_demotions))
            except Exception as err:
                for question in batch:
                    if not question.answer.done():
                        question.answer.set_exception(err)
            except asyncio.CancelledError:
                for question in batch:
                    question.answer.cancel()
                raise
            batch = again or self._next_batch()

    @staticmethod
    def _answer(batch: Sequence[_Question], replies: Sequence[Any]) -> list[_Question]:
        """Those that a replica refused, to be asked again: out of a pipeline redis-py lets such a reply through. Their
        connection makes itself anew, perhaps to the new master.
        """
        again: list[_Question] = []
        left = iter(replies)
        for question in batch:
            found = [next(left) for _ in question.commands]
            if question.num_demotions < RETRIES and any(isinstance(reply, redis.ReadOnlyError) for reply in found):
                again.append(question._replace(num_demotions=question.num_demotions + 1))
            elif not question.answer.done():
                question.answer.set_result(found)
        return again

    def _next_batch(self) -> list[_Question]:
        batch: list[_Question] = []
        room = MAX_ARGUMENTS
        while self._waiting and (not batch or room >= sum(map(len, self._waiting[0].commands))):
            question = self._waiting.popleft()
            if not question.answer.done():
                batch.append(question)
                room -= sum(map(len, question.commands))
        return batch
