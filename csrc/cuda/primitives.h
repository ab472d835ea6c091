// SPDX-License-Identifier: Apache-2.0
// Everything a kernel needs beyond plain C++, threadIdx, __syncthreads, __syncwarp, __shfl_*_sync,
// __ballot_sync and atomics: the only file with PTX or CUDA-only calls. Under FRNN_SIM the same
// names come from tests/sim, which runs the kernels on a CPU.
//
// Rules that keep a kernel runnable in both: shared memory only by FRNN_SHARED and FRNN_DYN_SMEM,
// no mutable __device__ or __constant__ variable, no <<<>>>, flags between blocks only by the
// functions below (a plain load may be stale in L1), the functions under FRNN_HAVE_CLUSTER only
// inside #if FRNN_HAVE_CLUSTER. In brackets: the section of the PTX ISA document, by title, since
// numbers change.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/plan.h"

namespace frnn::cuda {

struct Launch {
  dim3 grid, block;
  int cluster = 1;            // blocks along x of a cluster
  size_t smem = 0;            // bytes of dynamic shared memory
  bool cooperative = false;   // all blocks are resident at once, or the launch is an error
  bool programmatic = false;  // may start before the kernel ahead ends: see dependency_wait
  cudaStream_t stream = nullptr;
};

}  // namespace frnn::cuda

#if defined(FRNN_SIM)

#define FRNN_UNROLL
#define FRNN_ROLLED
#define FRNN_HAVE_CLUSTER 1
#include "cuda_sim.h"

#else

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FRNN_HAVE_CLUSTER 1
#else
#define FRNN_HAVE_CLUSTER 0
#endif

// Before a loop: unrolled, as it must be for the arrays it indexes to stay in registers; or not.
#define FRNN_UNROLL _Pragma("unroll")
#define FRNN_ROLLED _Pragma("unroll 1")

// T name[N] in shared memory, at most once per kernel and name; aligned for bulk copies.
#define FRNN_SHARED(T, name, N) __shared__ alignas(16) T name[N]
// The dynamic shared memory as unsigned char* name, 128-byte aligned.
#define FRNN_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]

namespace frnn::cuda {

// ---- Launch.

inline void check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would be told of it again
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(error));
}

// The current device.
inline Device current_device() {
  int index = 0;
  check("of a device", cudaGetDevice(&index));
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check("of a device", cudaDeviceGetAttribute(&value, attribute, index));
    return value;
  };
  return {ask(cudaDevAttrMultiProcessorCount),
          10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

inline int current_device_index() {
  int index = 0;
  check("of a device", cudaGetDevice(&index));
  return index;
}

// `n` words of zeros that kernels of all devices reach and that the host can read at any time; null
// if there are none. A graph that is being captured does not notice.
inline uint32_t* host_words(int n) {
  void* words = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error = cudaHostAlloc(&words, n * sizeof(uint32_t), cudaHostAllocPortable);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return static_cast<uint32_t*>(std::memset(words, 0, n * sizeof(uint32_t)));
}

// Sets bytes of global memory, in the order of the stream.
inline void fill(const char* name, void* p, int value, size_t bytes, cudaStream_t stream) {
  check(name, cudaMemsetAsync(p, value, bytes, stream));
}

// Lets a kernel on the current device have as many bytes of dynamic shared memory, for all later
// launches, other threads' too: without it 48 KB.
template <class... P>
void allow_shared_memory(const char* name, void (*kernel)(P...), size_t bytes) {
  check(name,
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// A launch as the runtime wants it; a kernel of a cluster of more than 8 blocks is allowed to be
// one.
struct Configuration {
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config = {};

  Configuration(const char* name, const void* function, const Launch& how) {
    if (how.cluster > 8) {
      check(name,
            cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.smem;
    config.stream = how.stream;
    config.attrs = attributes;
    if (how.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (how.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (how.programmatic) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

// How many clusters of such a launch the current device can hold at once; 0 if none, ever.
template <class... P>
int resident_clusters(const char* name, void (*kernel)(P...), const Launch& how) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const Configuration of(name, function, how);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, function, &of.config);
  if (error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();
    return 0;
  }
  check(name, error);
  return clusters;
}

// How many blocks of such a launch the current device can hold at once.
template <class... P>
int resident_blocks(const char* name, void (*kernel)(P...), const Launch& how) {
  int of_each = 0;
  check(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                  &of_each, reinterpret_cast<const void*>(kernel), static_cast<int>(how.block.x),
                  how.smem));
  return of_each * current_device().multiprocessors;
}

// Launches kernel(args...) as described; a failure throws and names the kernel.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Launch& how, A&&... args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const Configuration of(name, function, how);
  std::tuple<P...> values(static_cast<A&&>(args)...);
  std::apply(
      [&](P&... value) {
        void* pointers[sizeof...(P) + 1] = {const_cast<void*>(static_cast<const void*>(&value))...};
        check(name, cudaLaunchKernelExC(&of.config, function, pointers));
      },
      values);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- Tensor cores (mma). With g = lane / 4 and q = lane % 4, a thread holds of D rows g
// (and g + 8) at columns 2q and 2q + 1; of A rows g and g + 8; of B column g. Consecutive values
// of a register are consecutive k.

// d[16,8] += a[16,16] b[16,8]; a: (g, 2q), (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8); b: k 2q,
// 2q + 8. Products are exact, sums are in fp32 in an unspecified order.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with half operands.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16,8] += a[16,8] b[8,8]; a: (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); b: k q, q + 4.
// Of an operand that to_tf32 has not rounded, the low 13 bits are ignored.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[8,8] += a[8,4] b[4,8]; a: (g, q); b: (q, g); d: (g, 2q), (g, 2q + 1).
__device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

// Rounds to the 10 mantissa bits of tf32, ties away from zero (cvt).
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Four (two) 8x8 matrices of 16-bit values: lane 8i + r gives the address of row r of matrix i,
// 16-byte aligned, and r[i] becomes row g, columns 2q and 2q + 1 of matrix i (ldmatrix).
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// The same, every matrix transposed.
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit values held as by ldmatrix (movmatrix).
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// ---- Arithmetic. Two values rounded to nearest, low in the low half (cvt); a NaN becomes
// 0x7fff, never 0xffff, which the exchange buffers use as "empty".
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// tanh with a relative error of at most 2^-11 (tanh).
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp, subnormal values are 0 (rcp).
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x within 2 ulp, subnormal values are 0 (ex2).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Fetches the line of an address into the L2 cache, some time (prefetch).
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// ---- Asynchronous copies global -> shared (cp.async, cp.async.commit_group, cp.async.wait_group).

// Copies kBytes (4, 8 or 16, both addresses so aligned); only the first `bytes` are read, the rest
// become 0. Seen by this thread after cp_async_wait, by its block after a barrier behind that.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Flags and data exchanged between blocks through global memory (ld,
// st, red). Relaxed accesses are never torn per 32-bit word (64-bit for uint64_t)
// and never served by a stale L1 line, but order nothing.

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Pairs with store_release or red_release_add: what their thread saw before is seen after this.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Everything this thread did or, through a barrier, saw is visible before the new value is.
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void red_release_add(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Orders this thread's accesses before it and after it for all threads of the device, with
// relaxed accesses around it (membar, fence).
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// The same for the host too.
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// A word the host reads while the kernel runs (pinned memory), such as an error code.
__device__ __forceinline__ void store_system(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// ---- Barriers of some warps of a block (bar, barrier): id 1..15 (0 is __syncthreads), threads a
// multiple of 32 that counts those who wait and those who only arrive.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Time: nanoseconds of a clock that all SMs share (%globaltimer), cycles of this SM
// (%clock64).
__device__ __forceinline__ uint64_t global_timer() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
__device__ __forceinline__ uint64_t cycles() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(t));
  return t;
}

// ---- Programmatic dependent launch (griddepcontrol); before sm_90 there is none, and
// the kernel ahead has ended anyway.

// Waits until the kernels ahead have ended and their writes are visible. Every thread that reads
// or overwrites what they touch calls it first.
__device__ __forceinline__ void dependency_wait() {
#if FRNN_HAVE_CLUSTER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once every block has called this or ended; promises nothing about
// memory.
__device__ __forceinline__ void dependency_launch() {
#if FRNN_HAVE_CLUSTER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if FRNN_HAVE_CLUSTER

// ---- mbarrier (mbarrier): a phase completes when the expected arrivals and bytes are in. The
// word lives in shared memory, 8-byte aligned, initialised by one thread, then fence_mbarrier_init
// and a barrier before anyone uses it.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// Makes the initialisation visible to the cluster's st.async and bulk copies (membar, fence).
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Bytes the current phase waits for beside its arrivals; bytes that came first count negative, so
// the phase must still lack an arrival.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// One arrival; releases this thread's accesses to its block.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Whether the phase of this parity (0 first) has completed, after a bounded sleep; acquires from
// the cluster, which st.async data of other blocks need.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared.b64 p, [%1], %2; "
      "selp.b32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
// False if so many clock cycles have passed before it has.
__device__ __forceinline__ bool mbarrier_wait(uint64_t* barrier, uint32_t parity,
                                              int64_t patience) {
  const uint64_t start = cycles();
  while (!mbarrier_try_wait(barrier, parity)) {
    if (static_cast<int64_t>(cycles() - start) > patience) return false;
  }
  return true;
}

// Copies bytes (a multiple of 16, as are both addresses) and then counts them at the mbarrier of
// this block (cp.async.bulk). What this block wrote to `shared` before needs fence_proxy_async.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Orders accesses by plain instructions and by bulk copies (the async proxy) (membar, fence).
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// ---- Clusters and distributed shared memory.

// An address in the shared memory of a block of the cluster.
struct ClusterAddress {
  uint32_t address;
  __device__ __forceinline__ ClusterAddress operator+(int bytes) const {
    return {address + static_cast<uint32_t>(bytes)};
  }
};

// Where block `rank` of the cluster has what this block has at p (mapa).
__device__ __forceinline__ ClusterAddress map_rank(const void* p, int rank) {
  ClusterAddress d;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d.address) : "r"(shared_address(p)), "r"(rank));
  return d;
}

// This block's rank in its cluster, and the number of blocks (%cluster_ctarank, %cluster_nctarank).
__device__ __forceinline__ int cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return static_cast<int>(n);
}

// Barrier of all threads of the cluster: release, then acquire (barrier.cluster). No
// block may exit before the last access to its shared memory by another.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Plain accesses to another block's shared memory, ordered by cluster barriers.
__device__ __forceinline__ uint32_t cluster_load(ClusterAddress p) {
  uint32_t v;
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(v) : "r"(p.address) : "memory");
  return v;
}
__device__ __forceinline__ void cluster_store(ClusterAddress p, uint32_t v) {
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(p.address), "r"(v) : "memory");
}

// Stores some time later and then counts the bytes at an mbarrier of the same block as p, whose
// waiters see the value; orders nothing else (st.async). Aligned to its size.
__device__ __forceinline__ void store_async(ClusterAddress p, uint32_t v, ClusterAddress barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
          p.address),
      "r"(v), "r"(barrier.address)
      : "memory");
}
__device__ __forceinline__ void store_async(ClusterAddress p, uint4 v, ClusterAddress barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, "
      "[%5];" ::"r"(p.address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier.address)
      : "memory");
}

// One arrival at an mbarrier of another block; releases to the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(ClusterAddress barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.address)
               : "memory");
}

#endif  // FRNN_HAVE_CLUSTER

}  // namespace frnn::cuda

#endif  // FRNN_SIM
