// SPDX-License-Identifier: Apache-2.0
// Masks of dropout and zoneout. Included by recurrence.inl inside an anonymous namespace.

template <class T>
class Mask {
  // At a time: several vectors, since each multiplication waits for the one before.
  static constexpr int kCounters = 64;
  // Groups of them from which on a thread more pays.
  static constexpr int64_t kGroupsPerSlice = 64;

 public:
  static void run(const frnn::cpu::MaskArgs<T>& args, const frnn::cpu::Pool& pool) {
    const int64_t groups = (args.count + 4 * kCounters - 1) / (4 * kCounters);
    const int slices = static_cast<int>(min(1 + groups / kGroupsPerSlice, pool.threads));
    each_in_pool(pool, slices, groups, [&](int64_t i) { fill(args, i * kCounters); });
  }

 private:
  // The elements of kCounters counters.
  static void fill(const frnn::cpu::MaskArgs<T>& a, int64_t first) {
    frnn::PhiloxWords<kCounters> words;
    for (int lane = 0; lane < kCounters; ++lane) {
      const uint64_t counter = static_cast<uint64_t>(first + lane);
      words.word[0][lane] = static_cast<uint32_t>(counter);
      words.word[1][lane] = static_cast<uint32_t>(counter >> 32);
      words.word[2][lane] = a.place;
      words.word[3][lane] = a.kind;
    }
    frnn::philox(words, a.seed);
    const uint32_t threshold = a.threshold;
    const T scale = a.scale;
    T kept[4][kCounters], values[4 * kCounters];
    for (int k = 0; k < 4; ++k) {
      for (int lane = 0; lane < kCounters; ++lane) {
        kept[k][lane] = words.word[k][lane] < threshold ? T(0) : scale;
      }
    }
    for (int lane = 0; lane < kCounters; ++lane) {
      for (int k = 0; k < 4; ++k) values[4 * lane + k] = kept[k][lane];
    }
    const int64_t n = min(int64_t{4} * kCounters, a.count - 4 * first);
    __builtin_memcpy(a.mask + 4 * first, values, n * sizeof(T));
  }
};

template <class T>
void run_mask(const frnn::cpu::MaskArgs<T>& args, const frnn::cpu::Pool& pool) {
  Mask<T>::run(args, pool);
}
