// SPDX-License-Identifier: Apache-2.0
// Preloaded by `make tsan`. torch's threads are OpenMP's, whose runtime is not instrumented, so
// that ThreadSanitizer cannot see that a parallel region starts after what came before it and ends
// before what comes after it, and reports every argument as a race. This tells it so at the two
// places, and nothing else: races within a region are still found, and no report is suppressed.
#include <dlfcn.h>

void __tsan_acquire(void*);
void __tsan_release(void*);

struct region {
  void (*body)(void*);
  void* data;
};

static void run(void* pointer) {
  struct region* region = pointer;
  __tsan_acquire(region);
  region->body(region->data);
  __tsan_release(region);
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  void* openmp = dlopen("libgomp.so.1", RTLD_LAZY);
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = dlsym(openmp, "GOMP_parallel");
  struct region region = {body, data};
  __tsan_release(&region);
  parallel(run, &region, threads, flags);
  __tsan_acquire(&region);
}
