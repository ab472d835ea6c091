// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/primitives.h and the CUDA names kernels may use, for the simulator. Included by
// primitives.h only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "sim.h"

#define threadIdx (::frnn::sim::thread_index())
#define blockIdx (::frnn::sim::block_index())
#define blockDim (::frnn::sim::block_size())
#define gridDim (::frnn::sim::grid_size())

#define FRNN_SHARED(T, name, N)     \
  static const char name##_tag = 0; \
  T(&name)                          \
  [N] = *static_cast<T(*)[N]>(::frnn::sim::shared_array(&name##_tag, #name, sizeof(T) * (N)))
#define FRNN_DYN_SMEM(name) unsigned char* name = ::frnn::sim::dynamic_shared()

#define __launch_bounds__(...)

using std::max;
using std::min;

// ---- CUDA names.

inline void __syncthreads() { frnn::sim::block_barrier("__syncthreads", 0, 0, true); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { frnn::sim::sync_warp(mask); }
inline void __nanosleep(unsigned) { frnn::sim::yield(); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline void __trap() { frnn::sim::require(false, "__trap"); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

namespace frnn::sim {

inline int lane() {
  const uint3 t = thread_index();
  const dim3 n = block_size();
  return static_cast<int>((t.x + n.x * (t.y + n.y * t.z)) % 32);
}

template <class T>
T shuffle(const char* what, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Shuffle arguments = {0, 0, source};
  std::memcpy(&arguments.value, &value, sizeof(T));
  warp_collective(what, mask, &arguments, finish_shuffle);
  std::memcpy(static_cast<void*>(&value), &arguments.result, sizeof(T));
  return value;
}

// Replaces *p by f(*p), and returns what it was.
template <class T, class F>
T atomic_update(T* p, F f) {
  yield();
  before_atomic(p, sizeof(T));
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    next = f(old);
  } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace frnn::sim

// Lanes outside the segment of `width` give their own value, as on the device.
template <class T>
T __shfl_sync(uint32_t mask, T v, int source, int width = 32) {
  const int lane = frnn::sim::lane();
  return frnn::sim::shuffle("__shfl_sync", mask, v, (lane & -width) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32) {
  const int lane = frnn::sim::lane(), source = lane ^ lanes;
  return frnn::sim::shuffle("__shfl_xor_sync", mask, v,
                            source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
  const int lane = frnn::sim::lane(), source = lane + static_cast<int>(delta);
  return frnn::sim::shuffle("__shfl_down_sync", mask, v,
                            source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
  const int lane = frnn::sim::lane(), source = lane - static_cast<int>(delta);
  return frnn::sim::shuffle("__shfl_up_sync", mask, v, source >= (lane & -width) ? source : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  frnn::sim::Vote arguments = {predicate != 0, 0};
  frnn::sim::warp_collective("__ballot_sync", mask, &arguments, frnn::sim::finish_vote);
  return arguments.result;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return frnn::sim::atomic_update(p, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return frnn::sim::atomic_update(p, [v](T old) { return max(old, v); });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return frnn::sim::atomic_update(p, [v](T old) { return min(old, v); });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return frnn::sim::atomic_update(p, [v](T old) { return old | v; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return frnn::sim::atomic_update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return frnn::sim::atomic_update(p, [=](T old) { return old == expected ? v : old; });
}

// ---- csrc/cuda/primitives.h, in its order.

namespace frnn::cuda {

// So few multiprocessors that small shapes, too, fill the device or do not.
inline Device simulated_device = {3, 80, 227 * 1024};
inline Device current_device() { return simulated_device; }

// For tests of waits in vain: a cooperative grid lacks its last block, and the clock is fast.
inline bool loses_a_block = false;

inline int current_device_index() { return 0; }
inline uint32_t* host_words(int n) { return static_cast<uint32_t*>(std::calloc(n, 4)); }
inline void fill(const char*, void* p, int value, size_t bytes, cudaStream_t) {
  sim::finish();
  std::memset(p, value, bytes);
}

template <class... P>
int resident_clusters(const char*, void (*)(P...), const Launch& how) {
  return simulated_device.multiprocessors / how.cluster;
}
template <class... P>
int resident_blocks(const char*, void (*)(P...), const Launch&) {
  return simulated_device.multiprocessors;
}

template <class... P>
void allow_shared_memory(const char*, void (*kernel)(P...), size_t bytes) {
  sim::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Launch how, A&&... args) {
  sim::check_shared_memory(name, reinterpret_cast<const void*>(kernel), how.smem);
  const std::tuple<P...> values(static_cast<A&&>(args)...);
  if (loses_a_block && how.cooperative) --how.grid.x;
  sim::run(name, how, [kernel, values] { std::apply(kernel, values); });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  sim::Mma16 lane = {d, a, b};
  sim::warp_collective("mma_bf16", 0xffffffffu, &lane, sim::finish_mma_bf16);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  sim::Mma16 lane = {d, a, b};
  sim::warp_collective("mma_f16", 0xffffffffu, &lane, sim::finish_mma_f16);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  sim::Mma16 lane = {d, a, b};
  sim::warp_collective("mma_tf32", 0xffffffffu, &lane, sim::finish_mma_tf32);
}
inline void mma_f64(double (&d)[2], double a, double b) {
  sim::MmaF64 lane = {d, a, b};
  sim::warp_collective("mma_f64", 0xffffffffu, &lane, sim::finish_mma_f64);
}
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0xffffe000u;
  return (bits + 0x1000u) & 0xffffe000u;
}

template <size_t kCount>
void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4);
  sim::Matrices lane = {r, row, kCount, false};
  sim::warp_collective("ldmatrix", 0xffffffffu, &lane, sim::finish_ldmatrix);
}
template <size_t kCount>
void ldmatrix_trans(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4);
  sim::Matrices lane = {r, row, kCount, true};
  sim::warp_collective("ldmatrix_trans", 0xffffffffu, &lane, sim::finish_ldmatrix);
}
inline uint32_t movmatrix_trans(uint32_t a) {
  uint32_t lane = a;
  sim::warp_collective("movmatrix_trans", 0xffffffffu, &lane, sim::finish_movmatrix);
  return lane;
}

// A NaN is the one the device makes.
inline uint32_t pack_bf16(float low, float high) {
  auto bits = [](float x) -> uint32_t {
    if (std::isnan(x)) return 0x7fff;
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  };
  return bits(low) | bits(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  auto bits = [](float x) -> uint32_t {
    if (std::isnan(x)) return 0x7fff;
    return __half_as_ushort(__float2half_rn(x));
  };
  return bits(low) | bits(high) << 16;
}

// Wrong by up to 2^-12, so that nothing comes to depend on more.
inline float tanh_approx(float x) {
  float y = std::tanh(x);
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  if (std::isfinite(y)) bits = (bits + 0x800u) & 0xfffff000u;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

inline void prefetch(const void*) {}

template <int kBytes>
void cp_async(void* shared, const void* global, int bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  sim::cp_async(shared, global, kBytes, bytes);
}
inline void cp_async_commit() { sim::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  sim::cp_async_wait(kPending);
}

inline uint32_t load_relaxed(const uint32_t* p) {
  return static_cast<uint32_t>(sim::load_relaxed(p, 4));
}
inline uint64_t load_relaxed(const uint64_t* p) { return sim::load_relaxed(p, 8); }
inline uint4 load_relaxed(const uint4* p) {
  sim::require(reinterpret_cast<uintptr_t>(p) % 16 == 0, "load_relaxed of a misaligned uint4");
  return {load_relaxed(&p->x), load_relaxed(&p->y), load_relaxed(&p->z), load_relaxed(&p->w)};
}
inline void store_relaxed(uint32_t* p, uint32_t v) { sim::store_relaxed(p, v, 4); }
inline void store_relaxed(uint64_t* p, uint64_t v) { sim::store_relaxed(p, v, 8); }
inline void store_relaxed(uint4* p, uint4 v) {
  sim::require(reinterpret_cast<uintptr_t>(p) % 16 == 0, "store_relaxed of a misaligned uint4");
  store_relaxed(&p->x, v.x);
  store_relaxed(&p->y, v.y);
  store_relaxed(&p->z, v.z);
  store_relaxed(&p->w, v.w);
}
inline uint32_t load_acquire(const uint32_t* p) {
  return static_cast<uint32_t>(sim::load_relaxed(p, 4, true));
}
inline void store_release(uint32_t* p, uint32_t v) { sim::store_release(p, v); }
inline void red_release_add(uint32_t* p, uint32_t v) { sim::red_release_add(p, v); }
inline void fence_system() { sim::fence_gpu(); }
inline void fence_gpu() { sim::fence_gpu(); }
inline void store_system(uint32_t* p, uint32_t v) { sim::store_relaxed(p, v, 4); }

inline void bar_sync(int id, int threads) { sim::block_barrier("bar_sync", id, threads, true); }
inline void bar_arrive(int id, int threads) {
  sim::block_barrier("bar_arrive", id, threads, false);
}
inline uint64_t global_timer() { return sim::ticks(); }
inline uint64_t cycles() { return sim::ticks() * (loses_a_block ? 10'000'000 : 1); }

inline void dependency_wait() { sim::dependency_wait(); }
inline void dependency_launch() { sim::dependency_launch(); }

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  sim::mbarrier_init(barrier, arrivals);
}
inline void fence_mbarrier_init() { sim::fence_mbarrier_init(); }
inline void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  sim::mbarrier_expect(barrier, bytes);
}
inline void mbarrier_arrive(uint64_t* barrier) { sim::mbarrier_arrive(barrier, false); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  sim::mbarrier_expect(barrier, bytes);
  sim::mbarrier_arrive(barrier, false);
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  return sim::mbarrier_test(barrier, parity);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  sim::mbarrier_wait(barrier, parity);
}
inline bool mbarrier_wait(uint64_t* barrier, uint32_t parity, int64_t) {
  sim::mbarrier_wait(barrier, parity);  // a wait in vain is reported as a deadlock
  return true;
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  sim::bulk_copy(shared, global, bytes, barrier);
}
inline void fence_proxy_async() {}  // the simulator knows one proxy only

struct ClusterAddress {
  unsigned char* p;
  ClusterAddress operator+(int bytes) const { return {p + bytes}; }
};
inline ClusterAddress map_rank(const void* p, int rank) { return {sim::map_rank(p, rank)}; }
inline int cluster_rank() { return sim::cluster_rank(); }
inline int cluster_size() { return sim::cluster_size(); }
inline void cluster_arrive() { sim::cluster_arrive(); }
inline void cluster_wait() { sim::cluster_wait(); }
inline uint32_t cluster_load(ClusterAddress a) {
  sim::yield();
  sim::check_cluster("cluster_load", a.p, 4);
  return *reinterpret_cast<uint32_t*>(a.p);
}
inline void cluster_store(ClusterAddress a, uint32_t v) {
  sim::yield();
  sim::check_cluster("cluster_store", a.p, 4);
  *reinterpret_cast<uint32_t*>(a.p) = v;
}
inline void store_async(ClusterAddress a, uint32_t v, ClusterAddress barrier) {
  sim::store_async(a.p, &v, 4, barrier.p);
}
inline void store_async(ClusterAddress a, uint4 v, ClusterAddress barrier) {
  sim::store_async(a.p, &v, 16, barrier.p);
}
inline void mbarrier_arrive_remote(ClusterAddress barrier) {
  sim::mbarrier_arrive(barrier.p, true);
}

}  // namespace frnn::cuda
