// SPDX-License-Identifier: Apache-2.0
// What the CUDA names of cuda_sim.h stand on. Nothing here is a template, and the implementation is
// compiled apart: under ThreadSanitizer only the kernels are instrumented.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <cuda_runtime.h>

namespace frnn::cuda {
struct Launch;
}

namespace frnn::sim {

// Every later launch is a pure function of this seed and of the launches since.
void set_seed(uint64_t seed);

// What later launches do beside what the seed says. Threads of a block pause at a primitive, before
// fence_gpu or behind a barrier of the block, until nothing else goes on: those of a warp or, if it
// is -1, all. Stores of the word `late` take effect as late as they may and others do not; if it is
// -1, the seed says which.
void set_script(const std::string& pause, int block, int warp, int64_t late);

// The names of the kernels launched since this was last asked.
std::vector<std::string> launched();

// How many products their tensor cores have made since this was last asked.
uint64_t products();

// Runs all threads of a grid; throws std::runtime_error with a sentence that names kernel, block
// and thread.
void run(const char* kernel, const cuda::Launch& how, const std::function<void()>& body);

// The dynamic shared memory that launches of a kernel may ask for, 48 KB at first; throws if one
// asks for more.
void allow_shared_memory(const void* kernel, size_t bytes);
void check_shared_memory(const char* name, const void* kernel, size_t bytes);

// Runs what `host` launches once it has returned, a programmatic launch beside those ahead of it
// as soon as they allow it.
void overlapping(const std::function<void()>& host);

// Inside it: runs what has been launched, for an operation that comes after all of that.
void finish();

// ---- The running thread.
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
uint64_t ticks();  // how often a thread was chosen to run
void dependency_wait();
void dependency_launch();
void yield();  // another thread may run

// ---- Shared memory.
void* shared_array(const void* tag, const char* name, size_t bytes);
unsigned char* dynamic_shared();
unsigned char* map_rank(const void* p, int rank);
int cluster_rank();
int cluster_size();
// Checks an access to the shared memory of a live block of the cluster.
void check_cluster(const char* what, const void* p, size_t bytes);

// ---- Meetings.
void block_barrier(const char* what, int id, int threads, bool wait);
void cluster_arrive();
void cluster_wait();
// Waits for all lanes of the mask to call the same; the last one calls finish(arguments of each
// lane, mask).
using Finish = void (*)(void* const* lanes, uint32_t mask);
void warp_collective(const char* what, uint32_t mask, void* arguments, Finish finish);
void sync_warp(uint32_t mask);
void require(bool ok, const char* sentence);

// ---- Tensor core shapes: arguments of one lane.
struct Mma16 {
  float* d;
  const uint32_t *a, *b;
};
struct MmaF64 {
  double* d;
  double a, b;
};
struct Matrices {
  uint32_t* r;
  const void* row;
  int count;
  bool transpose;
};
struct Shuffle {
  uint64_t value, result;
  int source;
};
struct Vote {
  bool predicate;
  uint32_t result;
};
void finish_mma_bf16(void* const* lanes, uint32_t mask);
void finish_mma_f16(void* const* lanes, uint32_t mask);
void finish_mma_tf32(void* const* lanes, uint32_t mask);
void finish_mma_f64(void* const* lanes, uint32_t mask);
void finish_ldmatrix(void* const* lanes, uint32_t mask);
void finish_movmatrix(void* const* lanes, uint32_t mask);
void finish_shuffle(void* const* lanes, uint32_t mask);
void finish_vote(void* const* lanes, uint32_t mask);

// ---- Asynchronous copies and stores.
void cp_async(void* shared, const void* global, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void store_async(void* p, const void* value, int bytes, void* barrier);
void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_expect(uint64_t* barrier, uint32_t bytes);
void mbarrier_arrive(void* barrier, bool remote);
bool mbarrier_test(uint64_t* barrier, uint32_t parity);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void fence_mbarrier_init();

// ---- Global memory. Words are 4 or 8 bytes.
uint64_t load_relaxed(const void* p, int bytes, bool acquire = false);
void store_relaxed(void* p, uint64_t value, int bytes);
void store_release(uint32_t* p, uint32_t value);
void red_release_add(uint32_t* p, uint32_t value);
void fence_gpu();
// Before an atomic on p: earlier stores of the block to p come first.
void before_atomic(const void* p, size_t bytes);

}  // namespace frnn::sim
