// What C++ can do and Rust cannot: a thread-local variable under a C name, and the address that a hook returns to.
#include "shim.h"

__thread RfThread rf_thread;

extern "C" {

RfThread* rf_this_thread() { return &rf_thread; }

// Rust's checker: an access of `bytes` bytes from the instruction before `site`.
void rf_access(uintptr_t address, unsigned bytes, bool write, uintptr_t site);

// The thread sanitiser's run-time is not linked: these are its hooks, which watched code calls at every access.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

#define RF_HOOK(name, bytes, write)                                                                 \
    void name(void* address) {                                                                      \
        rf_access(reinterpret_cast<uintptr_t>(address), bytes, write,                               \
                  reinterpret_cast<uintptr_t>(__builtin_return_address(0)));                        \
    }
RF_HOOK(__tsan_read1, 1, false)
RF_HOOK(__tsan_read2, 2, false)
RF_HOOK(__tsan_read4, 4, false)
RF_HOOK(__tsan_read8, 8, false)
RF_HOOK(__tsan_read16, 16, false)
RF_HOOK(__tsan_write1, 1, true)
RF_HOOK(__tsan_write2, 2, true)
RF_HOOK(__tsan_write4, 4, true)
RF_HOOK(__tsan_write8, 8, true)
RF_HOOK(__tsan_write16, 16, true)
RF_HOOK(__tsan_unaligned_read2, 2, false)
RF_HOOK(__tsan_unaligned_read4, 4, false)
RF_HOOK(__tsan_unaligned_read8, 8, false)
RF_HOOK(__tsan_unaligned_read16, 16, false)
RF_HOOK(__tsan_unaligned_write2, 2, true)
RF_HOOK(__tsan_unaligned_write4, 4, true)
RF_HOOK(__tsan_unaligned_write8, 8, true)
RF_HOOK(__tsan_unaligned_write16, 16, true)

void __tsan_read_range(void* address, unsigned long bytes) {
    rf_access(reinterpret_cast<uintptr_t>(address), unsigned(bytes), false,
              reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
void __tsan_write_range(void* address, unsigned long bytes) {
    rf_access(reinterpret_cast<uintptr_t>(address), unsigned(bytes), true,
              reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

}  // extern "C"
