// Functions that GCC 12 calls and that manylinux_2_28 (glibc 2.28, libstdc++ of GCC 8) lacks. The compiler of the
// manylinux_2_28 image links definitions of its own instead.
#include <exception>
#include <new>
#include <sstream>

// glibc 2.32. Zero means that there may be other threads: shared_ptr then counts by atomic operations.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {

// GLIBCXX_3.4.29: what new[] calls for a size that overflows.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GLIBCXX_3.4.26: constructors without arguments.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

// CXXABI_1.3.13. The copy constructor and the destructor, which older libraries export, count references too. Their
// names have the version: without it the linker would take the inline ones of today's headers, which call these
// functions.
asm(".symver qlora_copy_exception_ptr, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
asm(".symver qlora_destroy_exception_ptr, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");
extern "C" void qlora_copy_exception_ptr(void* copy, const void* from);
extern "C" void qlora_destroy_exception_ptr(void* pointer);

namespace __exception_ptr {
void exception_ptr::_M_addref() noexcept {
  void* counted;  // never destroyed: the reference stays
  qlora_copy_exception_ptr(&counted, this);
}
void exception_ptr::_M_release() noexcept {
  qlora_destroy_exception_ptr(this);
  _M_exception_object = nullptr;
}
}  // namespace __exception_ptr
}  // namespace std
