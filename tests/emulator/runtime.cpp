// runtime.cpp - runs a kernel's threads as fibers, one at a time, and judges each memory access before it happens.
//
//   block --> fibers in random order --__syncthreads--> all arrived: next epoch and order --> ... --> all ended
//
// The kernel is compiled with -fsanitize=thread and others, but linked with this file instead of the sanitizers'
// libraries: the compiler puts a call before every access (__tsan_read4, ...) and wherever a rule of the language
// is broken (__ubsan_handle_..._abort), and those functions are defined here. A fault is noted, and the launch
// left through a switch to the caller's stack; no fiber goes on after it, so nothing is unwound.
//
// This file itself is compiled without such calls. Needs ELF (sections, segments) on x86-64 or AArch64.

#include <elf.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define RARE __attribute__((noinline, cold))
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace {

constexpr int kMaxThreads = 1024, kWarp = 32, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxShared = 48 << 10;
constexpr size_t kCellBytes = 2;  // the smallest element: two threads may write the halves of 4 bytes
constexpr size_t kCopyBytes = 16;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kStackReserve = 16 << 10;  // for what the kernel calls, these functions among them
constexpr size_t kStackStride = kStackBytes + 1024 + 64;  // no power of two: tops lie in different cache sets

// ---- what Python passes and gets; twins in __init__.py ----

struct Array {
    const char* name;
    uintptr_t start, bytes;
    int is_written;
};
struct Launch {
    void** arguments;
    const Array* arrays;
    int array_count;
    unsigned blocks, threads;
    uint64_t seed;
    char* stacks;  // emulated_stack_bytes()
};
struct Fault {
    unsigned block;
    int thread;       // -1: of no single thread
    uintptr_t code;   // where in this library, or 0
    char where[256];  // file:line, or empty
    char what[512];
};

// ---- the state of the one launch at a time ----

enum State { READY, AT_BARRIER, AT_WARP, ENDED };

struct Fiber {
    void* stack_pointer;
    uintptr_t stack;
    uintptr_t waits_at;
    int first_copy;
    State state;
};

// When a cell was last written and read: time << kIdBits | thread.
struct Cell {
    uint32_t write, read;
};
constexpr int kIdBits = 11;
constexpr uint32_t kIds = (1u << kIdBits) - 1;
constexpr uint32_t kSeveral = kMaxThreads;            // + warp: several threads of that warp
constexpr uint32_t kMixed = kMaxThreads + kMaxWarps;  // threads of several warps
constexpr uint32_t kPending = ~0u;                    // an asynchronous copy will write here
constexpr uint32_t kMaxTime = (1u << (32 - kIdBits)) - 2;

struct Copy {
    const void* source;
    int thread, next;  // the thread's next copy, by destination, or -1
};

const Array no_array = {"", 0, 0, 0};
const Launch* launch;
Fault* fault;
Fiber fibers[kMaxThreads];
uint16_t order[kMaxThreads];
unsigned position;       // in order: who runs next
bool is_warp_released;   // somebody before `position` may run again
uint64_t random_state;
unsigned block;
int me, my_warp;         // the thread that runs
uintptr_t my_stack;
void* caller_stack_pointer;
const Array* recent;     // the array of the last access

uintptr_t shared_start, shared_bytes;
Cell cells[kMaxShared / kCellBytes];
Copy copies[kMaxShared / kCopyBytes];
uint32_t now;            // counts barriers, of the block and of its warps
uint32_t stamp;          // now << kIdBits | me
uint32_t block_since;    // `now` after the last barrier of the block, << kIdBits
uint32_t warp_since[kMaxWarps];
int warp_arrived[kMaxWarps];
unsigned long long warp_values[kMaxThreads];

extern "C" {
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
void emulated_switch(void** save, void* load) __attribute__((visibility("hidden")));
void emulated_thread(void** arguments) __attribute__((visibility("hidden")));
}

// ---- faults ----

[[noreturn]] void leave() {
    void* unused;
    emulated_switch(&unused, caller_stack_pointer);
    __builtin_unreachable();
}

[[noreturn]] RARE void fail(int thread, uintptr_t code, const char* format, ...) {
    fault->block = block;
    fault->thread = thread;
    fault->code = code ? code - 1 - reinterpret_cast<uintptr_t>(__ehdr_start) : 0;  // - 1: in the call itself
    va_list values;
    va_start(values, format);
    vsnprintf(fault->what, sizeof fault->what, format, values);
    va_end(values);
    leave();
}

// ---- global memory ----

ALWAYS_INLINE bool is_within(uintptr_t address, size_t bytes, uintptr_t start, size_t length) {
    return address - start < length && bytes <= length - (address - start);
}

// Tables of constants lie in those parts of this library that nobody may write.
bool is_constant(uintptr_t address, size_t bytes) {
    uintptr_t image = reinterpret_cast<uintptr_t>(__ehdr_start);
    const Elf64_Ehdr* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    const Elf64_Phdr* segments = reinterpret_cast<const Elf64_Phdr*>(image + header->e_phoff);
    for (int i = 0; i < header->e_phnum; ++i) {
        const Elf64_Phdr& segment = segments[i];
        if (segment.p_type != PT_LOAD || segment.p_flags & PF_W) continue;
        if (is_within(address, bytes, image + segment.p_vaddr, segment.p_memsz)) return true;
    }
    return false;
}

const Array* find_array(uintptr_t address, size_t bytes, bool is_write) {
    const Array* found = nullptr;
    for (int i = 0; i < launch->array_count; ++i) {
        const Array& array = launch->arrays[i];
        if (!is_within(address, bytes, array.start, array.bytes)) continue;
        if (!is_write || array.is_written) return &array;
        found = &array;
    }
    return found;
}

[[noreturn]] RARE void fail_outside(uintptr_t address, size_t bytes, const char* verb, uintptr_t code) {
    const Array* nearest = nullptr;
    uintptr_t least = 1 << 20;  // farther away, it is not an index that is wrong
    for (int i = 0; i < launch->array_count; ++i) {
        const Array& array = launch->arrays[i];
        bool is_below = address < array.start, is_inside = address - array.start < array.bytes;
        uintptr_t distance = is_below ? array.start - address : address - array.start - array.bytes;
        if (is_inside) distance = 0;
        if (array.bytes && distance < least) least = distance, nearest = &array;
    }
    const char* owner = nearest ? nearest->name : "shared memory";
    uintptr_t start = nearest ? nearest->start : shared_start, size = nearest ? nearest->bytes : shared_bytes;
    if (nearest || (shared_bytes && address - shared_start + kMaxShared < 3 * kMaxShared))
        fail(me, code, "out of bounds: %s %zu bytes at byte %lld of %s, which has %zu bytes", verb, bytes,
             (long long)(address - start), owner, size);
    if (address < 4096) fail(me, code, "%s %zu bytes at byte %zu of a null pointer", verb, bytes, address);
    fail(me, code, "out of bounds: %s %zu bytes at 0x%zx, in no argument, shared array or local variable", verb,
         bytes, address);
}

RARE void check_elsewhere(uintptr_t address, size_t bytes, bool is_write, uintptr_t code) {
    const char* verb = is_write ? "writes" : "reads";
    const Array* array = find_array(address, bytes, is_write);
    if (array && is_write && !array->is_written)
        fail(me, code, "writes %zu bytes to %s, which is declared const", bytes, array->name);
    if (array)
        recent = array;
    else if (is_write || !is_constant(address, bytes))
        fail_outside(address, bytes, verb, code);
}

// ---- shared memory ----

// Whether an access by others at that time may come before or after one of this thread now.
bool is_unordered(uint32_t other) {
    uint32_t id = other & kIds, warp = id < kMaxThreads ? id / kWarp : id - kSeveral;
    uint32_t since = int(warp) == my_warp ? warp_since[warp] : block_since;
    return int(id) != me && other >= since;
}

[[noreturn]] RARE void fail_race(
    size_t offset, const char* verb, const char* did, uint32_t other, uintptr_t code) {
    char who[32] = "several threads";
    if ((other & kIds) < kMaxThreads) snprintf(who, sizeof who, "thread %u", other & kIds);
    fail(me, code, "race: %s byte %zu of shared memory, which %s %s with no barrier between", verb, offset, who,
         did);
}

RARE void check_last_write(size_t cell, const char* verb, uintptr_t code) {
    size_t offset = cell * kCellBytes;
    uint32_t write = cells[cell].write;
    if (write == 0)
        fail(me, code, "%s byte %zu of shared memory, which nothing wrote in this block", verb, offset);
    if (write == kPending)
        fail(me, code, "%s byte %zu of shared memory, into which thread %d copies asynchronously;"
             " no wait_async yet", verb, offset, copies[offset / kCopyBytes].thread);
    if (is_unordered(write)) fail_race(offset, verb, "wrote", write, code);
}

RARE uint32_t merge_reads(uint32_t read) {
    uint32_t id = read & kIds, warp = id < kMaxThreads ? id / kWarp : id - kSeveral;
    if (int(warp) != my_warp) return now << kIdBits | kMixed;
    return is_unordered(read) ? now << kIdBits | (kSeveral + my_warp) : stamp;
}

ALWAYS_INLINE void read_cell(size_t index, uintptr_t code) {
    Cell& cell = cells[index];
    // One comparison for "written, and before the last barrier".
    if (UNLIKELY(cell.write - 1 >= block_since - 1) && cell.write != stamp)
        check_last_write(index, "reads", code);
    if (cell.read < block_since)
        cell.read = stamp;
    else if (cell.read != stamp && (cell.read & kIds) != kMixed)
        cell.read = merge_reads(cell.read);
}

ALWAYS_INLINE void check_write(size_t index, const char* verb, uintptr_t code) {
    const Cell& cell = cells[index];
    if (UNLIKELY(cell.write >= block_since && cell.write != stamp)) check_last_write(index, verb, code);
    if (UNLIKELY(cell.read >= block_since && is_unordered(cell.read)))
        fail_race(index * kCellBytes, verb, "read", cell.read, code);
}

template <bool WRITE>
ALWAYS_INLINE void check_shared(size_t offset, size_t bytes, uintptr_t code) {
    if (UNLIKELY(bytes > shared_bytes - offset))
        fail(me, code, "out of bounds: %s %zu bytes at byte %zu of shared memory, which has %zu bytes",
             WRITE ? "writes" : "reads", bytes, offset, shared_bytes);
    for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
        if (WRITE) {
            check_write(i, "writes", code);
            cells[i].write = stamp;
        } else {
            read_cell(i, code);
        }
    }
}

template <bool WRITE>
ALWAYS_INLINE void check(uintptr_t address, size_t bytes, uintptr_t code) {
    uintptr_t offset = address - shared_start;
    if (offset < shared_bytes) return check_shared<WRITE>(offset, bytes, code);
    if (is_within(address, bytes, my_stack, kStackBytes)) return;
    const Array& array = *recent;
    if (is_within(address, bytes, array.start, array.bytes) && (!WRITE || array.is_written)) return;
    check_elsewhere(address, bytes, WRITE, code);
}

// Alignment beyond 8 is judged where the type is known, by __ubsan_handle_type_mismatch. clang leaves that out
// where a struct is copied: there 16 bytes at once must be aligned to 16, as if every such struct were declared so.
#if defined(__clang__)
constexpr size_t kMaxAlign = 16;
#else
constexpr size_t kMaxAlign = 8;
#endif

template <bool WRITE>
ALWAYS_INLINE void check_aligned(uintptr_t address, size_t bytes, uintptr_t code) {
    size_t align = bytes < kMaxAlign ? bytes : kMaxAlign;
    if (UNLIKELY(address & (align - 1)))
        fail(me, code, "misaligned: %s %zu bytes at 0x%zx, which is no multiple of %zu",
             WRITE ? "writes" : "reads", bytes, address, align);
    check<WRITE>(address, bytes, code);
}

template <bool WRITE>
ALWAYS_INLINE void check_copied(uintptr_t address, size_t bytes, uintptr_t code) {
    if (bytes == kMaxAlign && kMaxAlign == 16)
        check_aligned<WRITE>(address, bytes, code);
    else
        check<WRITE>(address, bytes, code);
}

// ---- asynchronous copies ----

void issue_copy(uintptr_t shared, const void* source, uintptr_t code) {
    uintptr_t offset = shared - shared_start, address = reinterpret_cast<uintptr_t>(source);
    if (shared % kCopyBytes || address % kCopyBytes)
        fail(me, code, "misaligned: an asynchronous copy from 0x%zx to 0x%zx, both must be multiples of %zu",
             address, shared, kCopyBytes);
    if (!is_within(shared, kCopyBytes, shared_start, shared_bytes))
        fail(me, code, "out of bounds: an asynchronous copy to 0x%zx, which is not shared memory", shared);
    if (!find_array(address, kCopyBytes, false))
        fail_outside(address, kCopyBytes, "copies asynchronously", code);
    for (size_t i = offset / kCellBytes; i < (offset + kCopyBytes) / kCellBytes; ++i) {
        check_write(i, "copies asynchronously to", code);
        cells[i].write = kPending;
    }
    Fiber& fiber = fibers[me];
    copies[offset / kCopyBytes] = {source, me, fiber.first_copy};
    fiber.first_copy = int(offset / kCopyBytes);
}

void land_copies() {
    int& first = fibers[me].first_copy;
    for (; first >= 0; first = copies[first].next) {
        size_t offset = size_t(first) * kCopyBytes;
        __builtin_memcpy(reinterpret_cast<void*>(shared_start + offset), copies[first].source, kCopyBytes);
        size_t cell = offset / kCellBytes, end = (offset + kCopyBytes) / kCellBytes;
        for (; cell < end; ++cell) cells[cell].write = stamp;
    }
}

// ---- fibers ----

#if defined(__x86_64__)
asm(R"(
    .text
    .globl emulated_switch
    .hidden emulated_switch
    .type emulated_switch, @function
emulated_switch:
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
// Six registers, then where to return to; one word more, since functions expect the stack as a call leaves it.
void* make_stack(uintptr_t top, void (*entry)()) {
    void** words = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) words[i] = nullptr;
    words[6] = reinterpret_cast<void*>(entry);
    return words;
}
#elif defined(__aarch64__)
asm(R"(
    .text
    .globl emulated_switch
    .hidden emulated_switch
    .type emulated_switch, %function
emulated_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
void* make_stack(uintptr_t top, void (*entry)()) {
    void** words = reinterpret_cast<void**>(top) - 20;
    for (int i = 0; i < 20; ++i) words[i] = nullptr;
    words[11] = reinterpret_cast<void*>(entry);  // x30, which ret jumps to
    return words;
}
#else
#error "the emulator switches stacks on x86-64 and AArch64 only"
#endif

void shuffle_order() {
    for (unsigned i = launch->threads - 1; i > 0; --i) {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        unsigned j = unsigned((random_state >> 32) * (i + 1) >> 32);
        uint16_t other = order[j];
        order[j] = order[i], order[i] = other;
    }
    position = 0;
}

void tick() {
    if (++now > kMaxTime) fail(me, 0, "more than %u barriers in one block", kMaxTime);
    stamp = now << kIdBits | unsigned(me);
}

// Either nobody is left and the block has ended, or all wait at the barrier and go on, or they never will.
void meet_block() {
    unsigned counts[4] = {};
    int waiting = 0;
    for (unsigned i = 0; i < launch->threads; ++i) {
        ++counts[fibers[i].state];
        if (fibers[i].state != ENDED) waiting = int(i);
    }
    if (counts[ENDED] == launch->threads) leave();
    if (counts[AT_BARRIER] < launch->threads)
        fail(-1, fibers[waiting].waits_at,
             "barrier that not all threads reach: of %u threads %u wait at __syncthreads(), %u for their warp,"
             " %u ended",
             launch->threads, counts[AT_BARRIER], counts[AT_WARP], counts[ENDED]);
    tick();
    block_since = now << kIdBits;
    for (unsigned i = 0; i < launch->threads; ++i) fibers[i].state = READY;
    for (uint32_t& since : warp_since) since = block_since;
    shuffle_order();
}

// Lets another thread run; returns when it is this one's turn again.
void run_next(void** save) {
    while (position == launch->threads || fibers[order[position]].state != READY) {
        if (position < launch->threads) {
            ++position;
        } else if (is_warp_released) {
            is_warp_released = false;
            position = 0;
        } else {
            meet_block();
        }
    }
    int next = order[position++];
    bool is_other = next != me || save == &caller_stack_pointer;
    me = next;
    my_warp = me / kWarp;
    my_stack = fibers[me].stack;
    stamp = now << kIdBits | unsigned(me);
    if (is_other) emulated_switch(save, fibers[me].stack_pointer);
}

void wait(State state, uintptr_t code) {
    Fiber& fiber = fibers[me];
    fiber.state = state;
    fiber.waits_at = code;
    run_next(&fiber.stack_pointer);
}

// All threads of the warp arrive before one goes on; says whether this one was the last.
bool meet_warp(unsigned mask, uintptr_t code) {
    int first = my_warp * kWarp, left = int(launch->threads) - first, lanes = left < kWarp ? left : kWarp;
    if (mask != 0xffffffffu)
        fail(me, code, "warp mask 0x%08x: only whole warps, 0xffffffff, are emulated", mask);
    if (++warp_arrived[my_warp] < lanes) {
        wait(AT_WARP, code);
        return false;
    }
    warp_arrived[my_warp] = 0;
    is_warp_released = true;
    for (int i = first; i < first + lanes; ++i) fibers[i].state = READY;
    return true;
}

void run_thread() {
    emulated_thread(launch->arguments);
    Fiber& fiber = fibers[me];
    if (fiber.first_copy >= 0)
        fail(me, 0, "ends with asynchronous copies that it has not waited for, one to byte %zu of shared memory",
             size_t(fiber.first_copy) * kCopyBytes);
    wait(ENDED, 0);
}

void run_block(uintptr_t stacks) {
    for (unsigned i = 0; i < launch->threads; ++i) {
        uintptr_t stack = stacks + i * kStackStride;
        fibers[i] = {make_stack(stack + kStackBytes, run_thread), stack, 0, -1, READY};
        order[i] = uint16_t(i);
    }
    for (size_t i = 0; i < (shared_bytes + kCellBytes - 1) / kCellBytes; ++i) {
        cells[i] = {0, 0};
        asm volatile("");  // keeps this loop from becoming a call of memset, which is the kernel's
    }
    now = 1;
    block_since = now << kIdBits;
    for (int i = 0; i < kMaxWarps; ++i) warp_since[i] = block_since, warp_arrived[i] = 0;
    is_warp_released = false;
    me = 0;
    shuffle_order();
    run_next(&caller_stack_pointer);
}

}  // namespace

// ---- what Python calls ----

extern "C" __attribute__((visibility("default"))) size_t emulated_shared_bytes() {
    return size_t(__stop_emulated_shared - __start_emulated_shared);
}

// Memory for the stacks of all fibers, the same in all libraries: one more below, where a large frame may reach.
extern "C" __attribute__((visibility("default"))) size_t emulated_stack_bytes() {
    return kStackStride * kMaxThreads + kStackBytes;
}

// What is noted says nothing if all went well.
extern "C" __attribute__((visibility("default"))) void emulated_launch(const Launch* given, Fault* noted) {
    launch = given;
    fault = noted;
    recent = &no_array;
    shared_start = reinterpret_cast<uintptr_t>(__start_emulated_shared);
    shared_bytes = emulated_shared_bytes();
    random_state = (given->seed + 1) * 0x9e3779b97f4a7c15u | 1;
    uintptr_t stacks = reinterpret_cast<uintptr_t>(given->stacks) + kStackBytes;
    for (block = 0; block < given->blocks && !fault->what[0]; ++block) run_block(stacks);
}

// ---- what the kernel calls ----

extern "C" {

unsigned emulated_thread_index() { return unsigned(me); }
unsigned emulated_block_index() { return block; }
unsigned emulated_block_size() { return launch->threads; }
unsigned emulated_grid_size() { return launch->blocks; }

void __syncthreads() { wait(AT_BARRIER, CALLER); }

void __syncwarp(unsigned mask) {
    // The last one notes the time for all, before any of them goes on.
    if (!meet_warp(mask, CALLER)) return;
    tick();
    warp_since[my_warp] = now << kIdBits;
}

// Orders nothing in shared memory, as on the GPU.
unsigned long long emulated_shuffle(unsigned mask, unsigned long long bits, unsigned from_lane) {
    int from = my_warp * kWarp + int(from_lane);
    if (from >= int(launch->threads))
        fail(me, CALLER, "shuffles from lane %u, which its warp does not have", from_lane);
    warp_values[me] = bits;
    meet_warp(mask, CALLER);
    unsigned long long value = warp_values[from];
    meet_warp(mask, CALLER);  // nobody overwrites before all have read
    return value;
}

void emulated_copy_async(void* shared, const void* global) {
    issue_copy(reinterpret_cast<uintptr_t>(shared), global, CALLER);
}
void emulated_wait_async() { land_copies(); }

// ---- what the compiler puts before accesses ----

#define ACCESS(bytes)                                                                              \
    void __tsan_read##bytes(uintptr_t address) { check_aligned<false>(address, bytes, CALLER); }   \
    void __tsan_write##bytes(uintptr_t address) { check_aligned<true>(address, bytes, CALLER); }   \
    void __tsan_unaligned_read##bytes(uintptr_t address) { check<false>(address, bytes, CALLER); } \
    void __tsan_unaligned_write##bytes(uintptr_t address) { check<true>(address, bytes, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(uintptr_t address, size_t bytes) {
    if (bytes) check<false>(address, bytes, CALLER);
}
void __tsan_write_range(uintptr_t address, size_t bytes) {
    if (bytes) check<true>(address, bytes, CALLER);
}
void __tsan_init() {}
void __tsan_func_exit() {}
void __tsan_func_entry(void*) {
    if (reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) < my_stack + kStackReserve)
        fail(me, CALLER, "more than %zu bytes of local variables", kStackBytes - kStackReserve);
}

// GCC leaves these as they are, clang renames them; -Bsymbolic keeps calls from going to the C library. Byte by
// byte, and in no loop that a compiler would replace by a call of the same function.
static void* move(void* to, const void* from, size_t bytes, uintptr_t code) {
    if (bytes) check_copied<false>(reinterpret_cast<uintptr_t>(from), bytes, code);
    if (bytes) check_copied<true>(reinterpret_cast<uintptr_t>(to), bytes, code);
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    bool is_forward = target < source;
    for (size_t i = 0; i < bytes; ++i) {
        size_t at = is_forward ? i : bytes - 1 - i;
        target[at] = source[at];
        asm volatile("");
    }
    return to;
}
static void* fill(void* to, int value, size_t bytes, uintptr_t code) {
    if (bytes) check_copied<true>(reinterpret_cast<uintptr_t>(to), bytes, code);
    for (size_t i = 0; i < bytes; ++i) {
        static_cast<char*>(to)[i] = char(value);
        asm volatile("");
    }
    return to;
}
void* memcpy(void* to, const void* from, size_t bytes) { return move(to, from, bytes, CALLER); }
void* memmove(void* to, const void* from, size_t bytes) { return move(to, from, bytes, CALLER); }
void* memset(void* to, int value, size_t bytes) { return fill(to, value, bytes, CALLER); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) { return move(to, from, bytes, CALLER); }
void* __tsan_memmove(void* to, const void* from, size_t bytes) { return move(to, from, bytes, CALLER); }
void* __tsan_memset(void* to, int value, size_t bytes) { return fill(to, value, bytes, CALLER); }

// ---- where the compiler puts what the language forbids; the layouts are those of compiler-rt's ubsan ----

struct Type {
    uint16_t kind, info;  // kind 0: an integer, info = log2 of its bits << 1 | is signed
    char name[1];
};
struct Broken {
    const char* file;
    uint32_t line, column;
    const Type* types[2];
};

static long long integer(const Type* type, uintptr_t value) {
    int drop = 64 - (1 << (type->info >> 1));  // the upper bits are not set
    if (drop <= 0) return (long long)value;
    return type->info & 1 ? (long long)(value << drop) >> drop : (long long)(value << drop >> drop);
}

static void locate(const Broken* broken) {
    snprintf(fault->where, sizeof fault->where, "%s:%u:%u", broken->file, broken->line, broken->column);
}

void __ubsan_handle_out_of_bounds_abort(const Broken* broken, uintptr_t index) {
    locate(broken);
    fail(me, 0, "out of bounds: index %lld of an array of type %s", integer(broken->types[1], index),
         broken->types[0]->name);
}
void __ubsan_handle_type_mismatch_v1_abort(const Broken* broken, uintptr_t address) {
    locate(broken);
    size_t align = size_t(1) << *reinterpret_cast<const uint8_t*>(&broken->types[1]);
    fail(me, 0, "misaligned: accesses %s at 0x%zx, which is no multiple of %zu", broken->types[0]->name, address,
         align);
}

static void fail_overflow(const Broken* broken, uintptr_t left, const char* sign, uintptr_t right) {
    const Type* type = broken->types[0];
    locate(broken);
    fail(me, 0, "integer overflow: %lld %s %lld in type %s", integer(type, left), sign, integer(type, right),
         type->name);
}
#define OVERFLOW(operation, sign)                                                                         \
    void __ubsan_handle_##operation##_overflow_abort(const Broken* broken, uintptr_t left, uintptr_t right) { \
        fail_overflow(broken, left, sign, right);                                                         \
    }
OVERFLOW(add, "+")
OVERFLOW(sub, "-")
OVERFLOW(mul, "*")
OVERFLOW(divrem, "/")

void __ubsan_handle_negate_overflow_abort(const Broken* broken, uintptr_t value) {
    locate(broken);
    fail(me, 0, "integer overflow: -(%lld) in type %s", integer(broken->types[0], value),
         broken->types[0]->name);
}
void __ubsan_handle_shift_out_of_bounds_abort(const Broken* broken, uintptr_t left, uintptr_t right) {
    locate(broken);
    fail(me, 0, "integer overflow: %lld shifted by %lld in type %s", integer(broken->types[0], left),
         integer(broken->types[1], right), broken->types[0]->name);
}
void __ubsan_handle_float_cast_overflow_abort(const Broken* broken, uintptr_t) {
    locate(broken);
    fail(me, 0, "overflow: a value of type %s does not fit into %s", broken->types[0]->name,
         broken->types[1]->name);
}
void __ubsan_handle_builtin_unreachable(const Broken* broken) {
    locate(broken);
    fail(me, 0, "runs into __builtin_unreachable()");
}
void __ubsan_handle_missing_return(const Broken* broken) {
    locate(broken);
    fail(me, 0, "a function that returns a value ends without return");
}

}  // extern "C"
