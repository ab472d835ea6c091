// SPDX-License-Identifier: Apache-2.0
// Masks of dropout and zoneout. Included by recurrence.inl inside an anonymous namespace.

template <class T>
class Mask {
  static constexpr int kCounters = kVectorBytes / sizeof(uint32_t);  // at a time
  // Vectors of counters from which on a thread more pays.
  static constexpr int64_t kVectorsPerSlice = 256;

 public:
  static void run(const frnn::cpu::MaskArgs<T>& args, const frnn::cpu::Pool& pool) {
    struct Context {
      const frnn::cpu::MaskArgs<T>& a;
      int64_t vectors;
      int slices;
    } context{args, (args.count + 4 * kCounters - 1) / (4 * kCounters), 1};
    const int64_t most = 1 + context.vectors / kVectorsPerSlice;
    context.slices = static_cast<int>(min(most, pool.threads));
    const auto body = [](int64_t begin, int64_t end, void* pointer) {
      const Context& c = *static_cast<const Context*>(pointer);
      const int64_t last = part(c.vectors, static_cast<int>(end - 1), c.slices).end;
      for (int64_t i = part(c.vectors, static_cast<int>(begin), c.slices).begin; i < last; ++i) {
        fill(c.a, i * kCounters);
      }
    };
    if (context.slices == 1) {
      body(0, 1, &context);
    } else {
      pool.run(context.slices, body, &context);
    }
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
    T values[4 * kCounters];
    for (int lane = 0; lane < kCounters; ++lane) {
      for (int k = 0; k < 4; ++k) {
        values[4 * lane + k] = words.word[k][lane] < a.threshold ? T(0) : a.scale;
      }
    }
    const int64_t n = min(int64_t{4} * kCounters, a.count - 4 * first);
    __builtin_memcpy(a.mask + 4 * first, values, n * sizeof(T));
  }
};

template <class T>
void run_mask(const frnn::cpu::MaskArgs<T>& args, const frnn::cpu::Pool& pool) {
  Mask<T>::run(args, pool);
}
