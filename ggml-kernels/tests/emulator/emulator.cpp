// Fibers, rendezvous and guarded memory of the CPU emulator (see emulator.h).
#include "emulator.h"
#include <cstdio>
#include <map>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {
enum State { RUN, WARP, BLOCK, DONE };
struct Copy {
    void *to;
    const void *from; // null: zeros
};
struct Fiber {
    void *stack_pointer;
    uint8_t *stack;
    State state;
    uint3 index;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
constexpr size_t STACK = 128 * 1024;
std::vector<Fiber> fibers;
std::vector<int> warp_arrived;
std::vector<Deposit> deposits;
int block_arrived, n_threads, current;
void *scheduler;
Body body;
const void *body_params;
std::vector<uint8_t> dynamic_shared;

std::map<std::string, Body> &kernels() {
    static std::map<std::string, Body> all;
    return all;
}
} // namespace

extern "C" void clsa_switch(void **save, void *load);
asm(R"(
.text
.globl clsa_switch
clsa_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace {
void yield() { clsa_switch(&fibers[current].stack_pointer, scheduler); }

void fiber_main() {
    body(body_params);
    fibers[current].state = DONE;
    yield();
    abort();
}

void resume(int i) {
    current = i;
    threadIdx = fibers[i].index;
    clsa_switch(&scheduler, fibers[i].stack_pointer);
}

void wait_warp() {
    Fiber &f = fibers[current];
    const int warp = current / 32;
    f.state = WARP;
    if (++warp_arrived[warp] == 32) {
        warp_arrived[warp] = 0;
        for (int i = warp * 32; i < warp * 32 + 32; ++i)
            fibers[i].state = RUN;
    }
    yield();
}
} // namespace

Register::Register(const char *name, Body b) { kernels()[name] = b; }
uint8_t *shared() {
    return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(dynamic_shared.data()) + 127) / 128 * 128);
}
int lane() { return current % 32; }
const Deposit *enter(const void *bytes, size_t n) {
    memcpy(deposits[current].bytes, bytes, n);
    wait_warp();
    return &deposits[current / 32 * 32];
}
void leave() { wait_warp(); }
void warp_barrier() { wait_warp(); }
void block_barrier() {
    fibers[current].state = BLOCK;
    ++block_arrived;
    yield();
}
void copy_async(void *to, const void *from, bool valid) {
    fibers[current].open.push_back({to, valid ? from : nullptr});
}
void copy_commit() {
    fibers[current].groups.push_back(fibers[current].open);
    fibers[current].open.clear();
}
void copy_wait(int pending) {
    auto &groups = fibers[current].groups;
    while ((int)groups.size() > pending) {
        for (const Copy &c : groups.front()) {
            if (c.from)
                memcpy(c.to, c.from, 16);
            else
                memset(c.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

// Runs one block; false on a deadlock.
static bool run_block(bool backwards) {
    for (int i = 0; i < n_threads; ++i) {
        Fiber &f = fibers[i];
        f.state = RUN;
        f.groups.clear();
        f.open.clear();
        f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        void **sp = reinterpret_cast<void **>(f.stack + STACK) - 2;
        *sp = reinterpret_cast<void *>(fiber_main);
        f.stack_pointer = sp - 6;
    }
    std::fill(warp_arrived.begin(), warp_arrived.end(), 0);
    block_arrived = 0;
    for (;;) {
        for (int w = 0; w < n_threads / 32; ++w) {
            const int warp = backwards ? n_threads / 32 - 1 - w : w;
            for (bool ran = true; ran;) {
                ran = false;
                for (int l = 0; l < 32; ++l) {
                    const int i = warp * 32 + (backwards ? 31 - l : l);
                    if (fibers[i].state == RUN) {
                        resume(i);
                        ran = true;
                    }
                }
            }
        }
        int done = 0;
        for (int i = 0; i < n_threads; ++i)
            done += fibers[i].state == DONE;
        if (done == n_threads)
            return true;
        if (block_arrived == 0 || block_arrived + done != n_threads) {
            int warp = 0;
            for (int i = 0; i < n_threads; ++i)
                warp += fibers[i].state == WARP;
            fprintf(
                stderr,
                "deadlock in block %u,%u,%u: %d threads done, %d at a block barrier, %d at a warp operation, of %d\n",
                blockIdx.x, blockIdx.y, blockIdx.z, done, block_arrived, warp, n_threads);
            return false;
        }
        block_arrived = 0;
        for (int i = 0; i < n_threads; ++i)
            if (fibers[i].state == BLOCK)
                fibers[i].state = RUN;
    }
}
} // namespace emulator

extern "C" {
// Runs a kernel over its grid; `backwards` runs blocks, warps and lanes in the opposite order, so that a missing
// barrier shows. 0: done, 1: no such kernel, 2: deadlock.
int clsa_emulate(const char *name, const uint32_t *grid, const uint32_t *block, size_t shared_bytes, const void *params,
                 int backwards) {
    using namespace emulator;
    const auto found = kernels().find(name);
    if (found == kernels().end())
        return 1;
    body = found->second;
    body_params = params;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    n_threads = (int)(block[0] * block[1] * block[2]);
    if (n_threads % 32 != 0 || n_threads > 1024)
        return 1;
    while ((int)fibers.size() < n_threads) {
        Fiber f{};
        f.stack = static_cast<uint8_t *>(aligned_alloc(64, STACK));
        fibers.push_back(f);
    }
    warp_arrived.resize(n_threads / 32);
    deposits.resize(n_threads);
    dynamic_shared.assign(shared_bytes + 128, 0xff);
    const uint32_t blocks = grid[0] * grid[1] * grid[2];
    for (uint32_t i = 0; i < blocks; ++i) {
        const uint32_t b = backwards ? blocks - 1 - i : i;
        blockIdx = {b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])};
        std::fill(dynamic_shared.begin(), dynamic_shared.end(), 0xff);
        if (!run_block(backwards != 0))
            return 2;
    }
    return 0;
}

// Memory that ends (up to 15 bytes) before a page that may not be touched.
void *clsa_emulate_alloc(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), aligned = (bytes + 15) / 16 * 16,
                 body_bytes = (aligned + page - 1) / page * page;
    uint8_t *p = static_cast<uint8_t *>(
        mmap(nullptr, body_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (p == MAP_FAILED || mprotect(p + body_bytes, page, PROT_NONE) != 0)
        abort();
    return p + body_bytes - aligned;
}
void clsa_emulate_free(void *p, size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), aligned = (bytes + 15) / 16 * 16,
                 body_bytes = (aligned + page - 1) / page * page;
    munmap(static_cast<uint8_t *>(p) + aligned - body_bytes, body_bytes + page);
}
}
