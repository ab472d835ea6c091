// SPDX-License-Identifier: Apache-2.0
// A cell alone, for one step: gates to states, element by element. Included by recurrence.inl
// inside an anonymous namespace.

template <class Cell, class T>
class Update {
  using V = Vec<T>;
  static constexpr int kGates = Cell::kGates, kParams = Cell::kParams;
  // Vectors from which on a thread more pays.
  static constexpr int64_t kVectorsPerSlice = 1024;

 public:
  static constexpr bool kExists = Cell::kStates == 2 && Cell::kAdditive && !Cell::kReadsH;

  static void forward(const frnn::cpu::UpdateArgs<T>& a, const frnn::cpu::Pool& pool) {
    each(a, pool, [&a](const Place& p) {
      const Step step = run(a, p);
      frnn::store(a.h_new + p.offset, step.out[0], p.n);
      frnn::store(a.c_new + p.offset, step.out[1], p.n);
    });
  }

  static void backward(const frnn::cpu::UpdateArgs<T>& a, const frnn::cpu::Pool& pool) {
    each(a, pool, [&a](const Place& p) {
      const Step step = run(a, p);
      const V dout[2] = {frnn::load_or_zero<V>(a.dh, p.offset, p.n),
                         frnn::load_or_zero<V>(a.dc, p.offset, p.n)};
      V dgx[kGates], dgh[kGates], ds[2], dp[kParams + 1];
      Cell::backward(step.state, step.saved, step.params.value, dout, dgx, dgh, ds, dp);
      for (int g = 0; g < kGates; ++g) frnn::store(a.dgates + gate(a, p, g), dgx[g], p.n);
      frnn::store(a.dc_prev + p.offset, ds[1], p.n);
      for (int k = 0; k < kParams; ++k) {
        frnn::store(a.dparams + k * a.b * a.h + p.offset, dp[k], p.n);
      }
    });
  }

 private:
  struct Step {
    frnn::Params<Cell, V> params;
    V state[2], out[2], saved[Cell::kSaved];
  };

  static Step run(const frnn::cpu::UpdateArgs<T>& a, const Place& p) {
    Step step{frnn::read_params<Cell, V>(a.params, a.h, p),
              {V{}, frnn::load<V>(a.c + p.offset, p.n)},
              {},
              {}};
    V gates[kGates];
    const V none[kGates] = {};
    for (int g = 0; g < kGates; ++g) gates[g] = frnn::load<V>(a.gates + gate(a, p, g), p.n);
    Cell::forward(gates, none, step.state, step.params.value, step.out, step.saved);
    return step;
  }

  static int64_t gate(const frnn::cpu::UpdateArgs<T>& a, const Place& p, int g) {
    return (p.row * kGates + g) * a.h + p.unit;
  }

  // Calls f for all places of [B, H], in slices.
  template <class F>
  static void each(const frnn::cpu::UpdateArgs<T>& a, const frnn::cpu::Pool& pool, const F& f) {
    const int64_t blocks = blocks_of<T>(a.h), vectors = a.b * blocks;
    const int slices = static_cast<int>(min(pool.threads, 1 + vectors / kVectorsPerSlice));
    each_in_pool(pool, slices, vectors,
                 [&](int64_t i) { f(place<kLanes<T>>(i / blocks, i % blocks, a.h)); });
  }
};
