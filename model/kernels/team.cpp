#include "team.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace embedq {
namespace {

// libgomp's entry for `#pragma omp parallel`: its ABI, stable since GCC 4.2.
using OpenMpTeam = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

OpenMpTeam open_mp_team = nullptr;

void drain(void* data) {
    auto& tasks = *static_cast<detail::Tasks*>(data);
    // Nothing may be thrown through OpenMP, so each thread keeps it to itself.
    const int status = status_of([&] {
        // One by one, so that a thread which something else holds up delays the others by one task at most.
        for (long task; (task = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;)
            tasks.run(tasks.body, task);
    });
    if (status) tasks.lacked_memory = true;
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

struct Buffer {
    std::unique_ptr<void, Free> memory;
    unsigned long bytes = 0;
};

}  // namespace

void detail::spread(int num_threads, Tasks& tasks) {
    const long threads = std::min<long>(num_threads, tasks.count);
    if (threads > 1 && open_mp_team)
        open_mp_team(drain, &tasks, static_cast<unsigned>(threads), 0);
    else
        drain(&tasks);
    if (tasks.lacked_memory) throw std::bad_alloc();
}

void* scratch(Scratch use, unsigned long bytes) {
    static thread_local Buffer buffers[2];
    Buffer& buffer = buffers[static_cast<int>(use)];
    if (buffer.bytes < bytes) {
        constexpr unsigned long alignment = 64;
        const unsigned long rounded = (bytes + alignment - 1) / alignment * alignment;
        buffer.memory.reset(std::aligned_alloc(alignment, rounded));
        buffer.bytes = buffer.memory ? rounded : 0;
        if (!buffer.memory) throw std::bad_alloc();
    }
    return buffer.memory.get();
}

}  // namespace embedq

extern "C" {

// Raised with every change of a function or struct that Python sees; the same in native.py.
int embedq_interface() { return 1; }

// team: the address of GOMP_parallel; without it there is one thread.
void embedq_set_team(void* team) { embedq::open_mp_team = reinterpret_cast<embedq::OpenMpTeam>(team); }

}
