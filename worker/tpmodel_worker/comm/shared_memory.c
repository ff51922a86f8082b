/* Collectives among the ranks of one machine, through memory that all of them map.
 *
 * Every rank has an arena: a header and two slots. A rank writes to its own arena only and reads
 * those of its peers. Collectives are counted; number s uses slot s % 2. A rank publishes s once its
 * part of s lies in its slot; since it takes part in them one after the other, it has then also
 * finished reading whatever belonged to s - 1. So before a slot is written again, for s, all peers
 * must have published s - 1, which costs nothing after a collective that waited for all anyway.
 *
 * Sums are taken in the order of the ranks, half-precision types in float32 with one rounding at the
 * end, so results are the same bits on every rank and whichever way a message went: in one shot
 * (everybody reads everything and sums) or, for large ones, in two (each rank sums a part, then
 * everybody gathers the parts).
 *
 * Peers are not trusted to be alive: every wait ends by abort, by a deadline, or when the peer shows
 * a newer epoch. No length or offset is ever read from a peer's memory.
 */
#define _GNU_SOURCE

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* Every processor with AVX2 converts float16 in hardware. */
#pragma GCC target("f16c")
#endif

#define LINE_BYTES 64
#define HEADER_BYTES 4096
#define MAGIC UINT64_C(0x6d6f632d6c646d70)
#define LAYOUT_VERSION 1

/* A signal is one word, so that epoch and sequence are always read together: the low bits of the
 * epoch above, the sequence below. 2^40 collectives last for weeks at one in a microsecond. */
#define SEQUENCE_BITS 40
#define SEQUENCE_MASK ((UINT64_C(1) << SEQUENCE_BITS) - 1)

/* From this size on the second barrier of a two-shot costs less than the reading it saves. */
#define TWO_SHOT_BYTES (64 * 1024)

#define SUM_BLOCK 512

#define YIELD_NANOSECONDS 200000
#define SHORT_SLEEP_NANOSECONDS 50000
#define LONG_SLEEP_NANOSECONDS 500000
#define LONG_SLEEP_AFTER_NANOSECONDS 20000000

/* Keep in step with shared_memory.py. */
enum result { RESULT_OK, RESULT_ABORTED, RESULT_DEADLINE, RESULT_EPOCH, RESULT_MISMATCH, RESULT_CORRUPT };
enum data_type { TYPE_FLOAT32, TYPE_FLOAT64, TYPE_FLOAT16, TYPE_BFLOAT16, TYPE_INT64, TYPE_COUNT };
enum operation { OPERATION_ALL_REDUCE = 1, OPERATION_ALL_GATHER, OPERATION_BROADCAST };

/* The first page of an arena. What peers poll lies in one cache line. */
struct header {
    uint64_t magic;
    uint64_t layout_version;
    uint64_t slot_bytes;
    _Alignas(LINE_BYTES) _Atomic uint64_t signal;
    _Atomic uint64_t epoch;
    /* For each slot: which collective its owner thinks this is. */
    _Atomic uint64_t call[2];
    _Alignas(LINE_BYTES) unsigned char end;
};
_Static_assert(offsetof(struct header, end) == 2 * LINE_BYTES, "a peer's signal must be alone in its cache line");
_Static_assert(sizeof(struct header) <= HEADER_BYTES, "the header must fit before the slots");

struct peer {
    struct header *header;
    /* The highest sequence seen of it. */
    uint64_t seen;
};

/* One rank's part in one epoch; private to its process. */
struct world {
    uint32_t rank;
    uint32_t size;
    uint64_t epoch;
    uint64_t tag;
    uint64_t sequence;
    uint64_t slot_bytes;
    uint64_t timeout;
    uint32_t pauses;
    enum result failure;
    uint32_t failed_peer;
    /* Inputs of the sum at hand, by rank. */
    const void **parts;
    /* Written by another thread. */
    _Alignas(LINE_BYTES) atomic_bool aborted;
    _Alignas(LINE_BYTES) struct peer peers[];
};

/* ------------------------------------------------------------------------------------------- sums */

static inline float widen_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline uint16_t narrow_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    /* To nearest, ties to even; a NaN must not become infinite by the rounding. */
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t quiet_nan = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

#define AS_IS(value) (value)
#define FLOAT16_TO_FLOAT(value) ((float)(value))
#define FLOAT_TO_FLOAT16(value) ((_Float16)(value))

/* The output may be one of the inputs: each block is read before it is written. */
#define DEFINE_SUM(name, type, wide_type, widen, narrow)                                                  \
    static void name(void *output, const void *const *inputs, uint32_t ranks, size_t count) {             \
        wide_type sums[SUM_BLOCK];                                                                        \
        for (size_t start = 0; start < count; start += SUM_BLOCK) {                                       \
            size_t length = count - start < SUM_BLOCK ? count - start : SUM_BLOCK;                        \
            const type *first = (const type *)inputs[0] + start;                                          \
            for (size_t i = 0; i < length; i++) sums[i] = widen(first[i]);                                \
            for (uint32_t rank = 1; rank < ranks; rank++) {                                               \
                const type *next = (const type *)inputs[rank] + start;                                    \
                for (size_t i = 0; i < length; i++) sums[i] += widen(next[i]);                            \
            }                                                                                             \
            type *target = (type *)output + start;                                                        \
            for (size_t i = 0; i < length; i++) target[i] = narrow(sums[i]);                              \
        }                                                                                                 \
    }

DEFINE_SUM(sum_float32, float, float, AS_IS, AS_IS)
DEFINE_SUM(sum_float64, double, double, AS_IS, AS_IS)
DEFINE_SUM(sum_float16, _Float16, float, FLOAT16_TO_FLOAT, FLOAT_TO_FLOAT16)
DEFINE_SUM(sum_bfloat16, uint16_t, float, widen_bfloat16, narrow_bfloat16)
/* Unsigned, since it wraps around without being undefined. */
DEFINE_SUM(sum_int64, uint64_t, uint64_t, AS_IS, AS_IS)

typedef void sum_function(void *output, const void *const *inputs, uint32_t ranks, size_t count);
static sum_function *const SUMS[TYPE_COUNT] = {sum_float32, sum_float64, sum_float16, sum_bfloat16, sum_int64};
static const size_t ITEM_BYTES[TYPE_COUNT] = {4, 8, 2, 2, 8};

/* ---------------------------------------------------------------------------------------- signals */

static inline void pause_processor(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static unsigned char *slot(const struct world *world, uint32_t rank, uint64_t sequence) {
    return (unsigned char *)world->peers[rank].header + HEADER_BYTES + (sequence % 2) * world->slot_bytes;
}

static enum result fail(struct world *world, enum result failure, uint32_t peer) {
    if (world->failure == RESULT_OK) {
        bool aborted = atomic_load_explicit(&world->aborted, memory_order_acquire);
        world->failure = aborted ? RESULT_ABORTED : failure;
        world->failed_peer = peer;
    }
    return world->failure;
}

/* Gives the processor away, the longer the wait the longer: there may be more ranks than processors. */
static void rest(uint64_t waited) {
    if (waited < YIELD_NANOSECONDS) {
        sched_yield();
        return;
    }
    long sleep = waited < LONG_SLEEP_AFTER_NANOSECONDS ? SHORT_SLEEP_NANOSECONDS : LONG_SLEEP_NANOSECONDS;
    nanosleep(&(struct timespec){.tv_nsec = sleep}, NULL);
}

static enum result wait_for(struct world *world, uint32_t rank, uint64_t sequence) {
    struct peer *peer = &world->peers[rank];
    uint64_t started = 0;
    for (uint32_t spins = 0; peer->seen < sequence; spins++) {
        uint64_t signal = atomic_load_explicit(&peer->header->signal, memory_order_acquire);
        if (signal >> SEQUENCE_BITS == world->tag && (signal & SEQUENCE_MASK) >= sequence) {
            peer->seen = signal & SEQUENCE_MASK;
            break;
        }
        if (atomic_load_explicit(&world->aborted, memory_order_relaxed)) return fail(world, RESULT_ABORTED, rank);
        if (spins < world->pauses) {
            pause_processor();
            continue;
        }
        if (atomic_load_explicit(&peer->header->epoch, memory_order_relaxed) != world->epoch)
            return fail(world, RESULT_EPOCH, rank);
        uint64_t now = nanoseconds();
        if (started == 0) started = now;
        if (now - started > world->timeout) return fail(world, RESULT_DEADLINE, rank);
        rest(now - started);
    }
    return RESULT_OK;
}

static enum result wait_for_all(struct world *world, uint64_t sequence) {
    for (uint32_t rank = 0; rank < world->size; rank++) {
        if (rank == world->rank) continue;
        enum result result = wait_for(world, rank, sequence);
        if (result != RESULT_OK) return result;
    }
    return RESULT_OK;
}

/* Waits until the peer's part of the present collective can be read. */
static enum result wait_for_part(struct world *world, uint32_t rank, uint64_t call) {
    enum result result = wait_for(world, rank, world->sequence);
    if (result != RESULT_OK) return result;
    struct header *header = world->peers[rank].header;
    if (atomic_load_explicit(&header->call[world->sequence % 2], memory_order_relaxed) != call)
        return fail(world, RESULT_MISMATCH, rank);
    return RESULT_OK;
}

static void publish(struct world *world, uint64_t call) {
    struct header *own = world->peers[world->rank].header;
    atomic_store_explicit(&own->call[world->sequence % 2], call, memory_order_relaxed);
    uint64_t signal = world->tag << SEQUENCE_BITS | world->sequence;
    atomic_store_explicit(&own->signal, signal, memory_order_release);
}

/* What was read of a peer counts only if the peer has not begun a newer epoch meanwhile: it shows the
 * new epoch before it overwrites anything. */
static enum result check_epochs(struct world *world) {
    atomic_thread_fence(memory_order_acquire);
    for (uint32_t rank = 0; rank < world->size; rank++) {
        uint64_t epoch = atomic_load_explicit(&world->peers[rank].header->epoch, memory_order_relaxed);
        if (epoch != world->epoch) return fail(world, RESULT_EPOCH, rank);
    }
    return RESULT_OK;
}

static uint64_t describe(enum operation operation, uint64_t detail, uint64_t bytes) {
    return (uint64_t)operation << 56 | detail << 40 | bytes;
}

static enum result enter(struct world *world) {
    if (world->failure != RESULT_OK) return world->failure;
    if (atomic_load_explicit(&world->aborted, memory_order_acquire)) return fail(world, RESULT_ABORTED, world->rank);
    return RESULT_OK;
}

/* ------------------------------------------------------------------------------------ collectives */

/* Takes the next sequence, and waits until this rank's slot for it is read by nobody any more. */
static enum result begin(struct world *world) {
    world->sequence++;
    return wait_for_all(world, world->sequence - 1);
}

/* Puts bytes of this rank into the next slot, shows them, and waits until all peers have done so. */
static enum result exchange(struct world *world, uint64_t call, const void *data, size_t offset, size_t bytes) {
    enum result result = begin(world);
    if (result != RESULT_OK) return result;
    memcpy(slot(world, world->rank, world->sequence) + offset, data, bytes);
    publish(world, call);
    for (uint32_t rank = 0; rank < world->size; rank++) {
        if (rank == world->rank) continue;
        result = wait_for_part(world, rank, call);
        if (result != RESULT_OK) return result;
    }
    return RESULT_OK;
}

/* Sums items of all ranks' slots, from an offset on, into this rank's data. */
static void sum_parts(struct world *world, unsigned char *data, enum data_type type, size_t offset, size_t count) {
    for (uint32_t rank = 0; rank < world->size; rank++)
        world->parts[rank] = rank == world->rank ? data : slot(world, rank, world->sequence) + offset;
    SUMS[type](data, world->parts, world->size, count);
}

static enum result one_shot(struct world *world, uint64_t call, unsigned char *data, enum data_type type, size_t count) {
    enum result result = exchange(world, call, data, 0, count * ITEM_BYTES[type]);
    if (result != RESULT_OK) return result;
    sum_parts(world, data, type, 0, count);
    return check_epochs(world);
}

static enum result two_shot(struct world *world, uint64_t call, unsigned char *data, enum data_type type, size_t count) {
    size_t item = ITEM_BYTES[type];
    size_t bytes = count * item;
    /* Whole cache lines for each rank; the last ranks' shares may be short or empty. */
    size_t share = ((bytes + world->size - 1) / world->size + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
    size_t start = share * world->rank < bytes ? share * world->rank : bytes;
    size_t length = bytes - start < share ? bytes - start : share;

    enum result result = exchange(world, call, data, 0, bytes);
    if (result != RESULT_OK) return result;
    sum_parts(world, data + start, type, start, length / item);
    result = exchange(world, call, data + start, start, length);
    if (result != RESULT_OK) return result;
    for (uint32_t rank = 0; rank < world->size; rank++) {
        size_t from = share * rank;
        if (rank == world->rank || from >= bytes) continue;
        size_t part = bytes - from < share ? bytes - from : share;
        memcpy(data + from, slot(world, rank, world->sequence) + from, part);
    }
    return check_epochs(world);
}

/* Sums `count` items over all ranks, in place. */
int tpmodel_all_reduce(struct world *world, void *data, uint64_t count, uint32_t type) {
    enum result result = enter(world);
    if (type >= TYPE_COUNT) return fail(world, RESULT_MISMATCH, world->rank);
    size_t item = ITEM_BYTES[type];
    uint64_t call = describe(OPERATION_ALL_REDUCE, type, count * item);
    size_t most = world->slot_bytes / item;
    for (uint64_t done = 0; done < count && result == RESULT_OK;) {
        size_t part = count - done < most ? count - done : most;
        bool large = world->size > 2 && part * item >= TWO_SHOT_BYTES;
        unsigned char *start = (unsigned char *)data + done * item;
        result = large ? two_shot(world, call, start, type, part) : one_shot(world, call, start, type, part);
        done += part;
    }
    return result;
}

/* Fills output with `bytes` of every rank, by rank. */
int tpmodel_all_gather(struct world *world, const void *input, void *output, uint64_t bytes) {
    enum result result = enter(world);
    uint64_t call = describe(OPERATION_ALL_GATHER, 0, bytes);
    for (uint64_t done = 0; done < bytes && result == RESULT_OK;) {
        size_t part = bytes - done < world->slot_bytes ? bytes - done : world->slot_bytes;
        const unsigned char *own = (const unsigned char *)input + done;
        result = exchange(world, call, own, 0, part);
        if (result != RESULT_OK) break;
        for (uint32_t rank = 0; rank < world->size; rank++) {
            unsigned char *target = (unsigned char *)output + rank * bytes + done;
            memcpy(target, rank == world->rank ? own : slot(world, rank, world->sequence), part);
        }
        result = check_epochs(world);
        done += part;
    }
    return result;
}

/* Overwrites `bytes` by the root's. */
int tpmodel_broadcast(struct world *world, void *data, uint64_t bytes, uint32_t root) {
    enum result result = enter(world);
    if (root >= world->size) return fail(world, RESULT_MISMATCH, world->rank);
    uint64_t call = describe(OPERATION_BROADCAST, root, bytes);
    for (uint64_t done = 0; done < bytes && result == RESULT_OK;) {
        size_t part = bytes - done < world->slot_bytes ? bytes - done : world->slot_bytes;
        unsigned char *start = (unsigned char *)data + done;
        result = begin(world);
        if (result != RESULT_OK) break;
        if (world->rank == root) {
            memcpy(slot(world, root, world->sequence), start, part);
            publish(world, call);
        } else {
            publish(world, call);
            result = wait_for_part(world, root, call);
            if (result != RESULT_OK) break;
            memcpy(start, slot(world, root, world->sequence), part);
            result = check_epochs(world);
        }
        done += part;
    }
    return result;
}

/* ------------------------------------------------------------------------------------- life cycle */

/* Bytes of an arena with slots of slot_bytes each. */
uint64_t tpmodel_arena_bytes(uint64_t slot_bytes) {
    return HEADER_BYTES + 2 * slot_bytes;
}

/* Makes a rank's own arena ready for an epoch. The epoch comes first: a peer that still reads what
 * belongs to an older one then knows that it read rubbish. */
void tpmodel_arena_reset(void *arena, uint64_t slot_bytes, uint64_t epoch) {
    struct header *header = arena;
    atomic_store_explicit(&header->epoch, epoch, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    header->magic = MAGIC;
    header->layout_version = LAYOUT_VERSION;
    header->slot_bytes = slot_bytes;
    atomic_store_explicit(&header->call[0], 0, memory_order_relaxed);
    atomic_store_explicit(&header->call[1], 0, memory_order_relaxed);
    atomic_store_explicit(&header->signal, epoch << SEQUENCE_BITS, memory_order_release);
}

/* RESULT_OK when a peer's arena has this layout and this epoch. */
int tpmodel_arena_check(const void *arena, uint64_t slot_bytes, uint64_t epoch) {
    const struct header *header = arena;
    if (header->magic != MAGIC || header->layout_version != LAYOUT_VERSION || header->slot_bytes != slot_bytes)
        return RESULT_CORRUPT;
    return atomic_load_explicit(&header->epoch, memory_order_acquire) == epoch ? RESULT_OK : RESULT_EPOCH;
}

/* Joins the arenas of all ranks, by rank, which must stay mapped until the world is destroyed.
 * timeout: nanoseconds that a peer may be late; pauses: polls before the processor is given away.
 * NULL when there is no memory. */
struct world *tpmodel_world_create(uint32_t rank, uint32_t size, void *const *arenas, uint64_t slot_bytes,
                                   uint64_t epoch, uint64_t timeout, uint32_t pauses) {
    size_t bytes = sizeof(struct world) + size * sizeof(struct peer);
    struct world *world = aligned_alloc(LINE_BYTES, (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES);
    if (world == NULL) return NULL;
    memset(world, 0, bytes);
    world->parts = calloc(size, sizeof *world->parts);
    if (world->parts == NULL) {
        free(world);
        return NULL;
    }
    world->rank = rank;
    world->size = size;
    world->epoch = epoch;
    world->tag = epoch << SEQUENCE_BITS >> SEQUENCE_BITS;
    world->slot_bytes = slot_bytes;
    world->timeout = timeout;
    world->pauses = pauses;
    for (uint32_t index = 0; index < size; index++) world->peers[index].header = arenas[index];
    return world;
}

void tpmodel_world_destroy(struct world *world) {
    free(world->parts);
    free(world);
}

/* Releases the rank from its collective and from all later ones. From any thread. */
void tpmodel_world_abort(struct world *world) {
    atomic_store_explicit(&world->aborted, true, memory_order_release);
}

/* The rank that the first failure was about. */
uint32_t tpmodel_world_failed_peer(const struct world *world) {
    return world->failed_peer;
}

/* Collectives that this rank has begun. */
uint64_t tpmodel_world_sequence(const struct world *world) {
    return world->sequence;
}
