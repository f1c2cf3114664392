// Threads: one pool for this library and for torch, which is torch's own OpenMP team.
#pragma once

#include <atomic>
#include <new>
#include <type_traits>

namespace embedq {

// Calls body(task) for 0 <= task < count on so many threads; returns when all are done. Throws std::bad_alloc if one did.
template <class Body>
void parallel(int num_threads, long count, Body&& body);

namespace detail {

struct Tasks {
    std::atomic<long> next{0};
    long count;
    void (*run)(void* body, long task);
    void* body;
    std::atomic<bool> lacked_memory{false};
};

void spread(int num_threads, Tasks& tasks);

}  // namespace detail

template <class Body>
void parallel(int num_threads, long count, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    detail::Tasks tasks;
    tasks.count = count;
    tasks.run = [](void* self, long task) { (*static_cast<Plain*>(self))(task); };
    tasks.body = &body;
    detail::spread(num_threads, tasks);
}

// 0, or 1 if memory ran out: nothing may be thrown through C.
template <class Body>
int status_of(Body&& body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Memory of the calling thread that stays for its next call; its content does not. Throws std::bad_alloc.
enum class Scratch { shared, own };
void* scratch(Scratch use, unsigned long bytes);

}  // namespace embedq
