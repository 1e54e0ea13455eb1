// Memory whose surroundings are out of bounds: every run of elements lies against a page that nobody may touch, and
// what else its pages hold is checked not to be written. AddressSanitizer is told of it as well.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) (static_cast<void>(begin), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) (static_cast<void>(begin), static_cast<void>(size))
#endif

namespace trust {

constexpr int64_t kPage = 4096;
constexpr int kCanary = 0xFF;  // a NaN in every dtype: what is read by mistake spoils the result

inline int64_t up(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

[[noreturn]] inline void fail(const std::string& text) {
  const std::string line = text + "\n";
  if (write(STDERR_FILENO, line.data(), line.size())) std::_Exit(1);
  std::_Exit(1);
}

// Where a run lies against its guard.
enum class Side { kFront, kBack };

// `count` runs of `bytes` each, `step` apart, a multiple of pages where there are several. Nothing else is mapped.
class Guarded {
 public:
  Guarded(int64_t count, int64_t bytes, int64_t step, Side side) : count_(count), bytes_(bytes), step_(step) {
    if (count == 0 || bytes == 0) return;
    reserved_ = (count - 1) * step + up(bytes) + 2 * kPage;
    base_ = static_cast<char*>(mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail("no memory to reserve");
    first_ = base_ + kPage + (side == Side::kBack ? up(bytes) - bytes : 0);
    for (int64_t i = 0; i < count; ++i) {
      char* const pages = base_ + kPage + i * step;
      if (mprotect(pages, up(bytes), PROT_READ | PROT_WRITE) != 0) fail("no memory for a run");
      std::memset(pages, kCanary, up(bytes));
      ASAN_POISON_MEMORY_REGION(pages, up(bytes));
      ASAN_UNPOISON_MEMORY_REGION(run(i), bytes);
    }
  }
  ~Guarded() {
    if (!base_) return;
    for (int64_t i = 0; i < count_; ++i) ASAN_UNPOISON_MEMORY_REGION(base_ + kPage + i * step_, up(bytes_));
    munmap(base_, reserved_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  // The first run, or null where there is no byte, as a Tensor has it.
  char* data() const { return first_; }
  char* run(int64_t i) const { return first_ + i * step_; }

  // Whether the pages around the runs are as they were.
  bool surroundings_untouched() const {
    for (int64_t i = 0; i < (base_ ? count_ : 0); ++i) {
      char* const pages = base_ + kPage + i * step_;
      ASAN_UNPOISON_MEMORY_REGION(pages, up(bytes_));
      for (char* p = pages; p < pages + up(bytes_); ++p) {
        if (p == run(i)) p += bytes_;
        if (p < pages + up(bytes_) && static_cast<unsigned char>(*p) != kCanary) return false;
      }
    }
    return true;
  }

 private:
  int64_t count_, bytes_, step_, reserved_ = 0;
  char *base_ = nullptr, *first_ = nullptr;
};

// How three axes lie in memory.
struct Layout {
  const char* name;
  std::array<int, 3> order;  // outermost first
  int64_t step;              // between elements of the innermost axis
  int apart;                 // so many outer axes step by whole pages, each run between guards
  int64_t least;             // elements that such an axis steps by at least
  bool expanded;             // the outermost axis has stride 0
};

// A three-dimensional operand in guarded memory.
template <class T>
class Operand {
 public:
  Operand(std::array<int64_t, 3> sizes, const Layout& layout, Side side)
      : sizes_(sizes), memory_(plan(sizes, layout, side)) {}

  std::array<int64_t, 3> strides() const { return strides_; }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  T& at(int64_t i, int64_t j, int64_t l) const { return data()[i * strides_[0] + j * strides_[1] + l * strides_[2]]; }
  bool surroundings_untouched() const { return memory_.surroundings_untouched(); }

  template <class Value>
  void fill(const Value& value) const {
    for_each([&](T& element) { element = value(); });
  }
  template <class Body>
  void for_each(const Body& body) const {
    for (int64_t i = 0; i < sizes_[0]; ++i)
      for (int64_t j = 0; j < sizes_[1]; ++j)
        for (int64_t l = 0; l < sizes_[2]; ++l) body(at(i, j, l));
  }

 private:
  Guarded plan(const std::array<int64_t, 3>& sizes, const Layout& layout, Side side) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    int64_t span = 1, runs = 1, run = 0, step = 0;  // elements from the first to the last of the axes so far, plus one
    int64_t stride = layout.step;
    for (int depth = 2; depth >= 0; --depth) {
      const int axis = layout.order[depth];
      if (depth < layout.apart) {
        if (run == 0) {
          run = span;
          step = up(std::max(layout.least, run) * kSize) + kPage;  // a page of guard, whatever side the run lies on
          stride = step / kSize;
        }
        strides_[axis] = stride;
        runs *= sizes[axis];
        stride *= sizes[axis];
        continue;
      }
      const bool expanded = layout.expanded && depth == 0;
      strides_[axis] = expanded ? 0 : stride;
      if (expanded) continue;
      span += (sizes[axis] - 1) * stride;
      stride *= sizes[axis];
    }
    if (run == 0) run = span;
    const bool empty = sizes[0] * sizes[1] * sizes[2] == 0;
    return {empty ? 0 : runs, run * kSize, step, side};
  }

  std::array<int64_t, 3> sizes_, strides_{};
  Guarded memory_;
};

}  // namespace trust
