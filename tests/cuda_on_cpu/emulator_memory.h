// The emulator's memory: checked and counted global accesses, poisoned and race-checked shared memory, bf16 and fp16.
//
// Global: an access must lie in a registered allocation, be aligned, and store only where storing is allowed. A warp's
// accesses at one source line and turn are one transaction: equal addresses count once, and the 32-byte sectors it
// touches are counted beside the bytes it uses. Shared<T> elements know who wrote and read them since which barrier.
#pragma once
#include <algorithm>

namespace emu {

struct Allocation {
  uintptr_t first, last;
  bool writable;
};

struct Traffic {
  uint64_t loaded, stored, load_sectors, store_sectors, transactions;
};

struct Transaction {
  uint16_t lanes = 0, size = 0;
  uintptr_t address[32];
};

constexpr int kSites = 128;
inline std::vector<Allocation> allocations;
inline Allocation last_allocation{1, 0, false};
inline Traffic traffic{};
inline struct Site {
  const char* file;
  int line;
  bool store;
} sites[kSites];
inline int site_count = 0;
inline std::vector<Transaction> transactions[kMaxThreads / 32][kSites];
inline uint32_t turns[kMaxThreads][kSites];

inline void settle_traffic() {
  for (int warp = 0; warp * 32 < thread_count; ++warp) {
    for (int site = 0; site < site_count; ++site) {
      for (Transaction& t : transactions[warp][site]) {
        std::sort(t.address, t.address + t.lanes);
        uint64_t bytes = 0, sectors = 0;
        uintptr_t end = 0, next_sector = 0;
        for (int i = 0; i < t.lanes; ++i) {
          uintptr_t first = std::max(t.address[i], end), last = t.address[i] + t.size;
          if (first < last) bytes += last - first, end = last;
          uintptr_t low = std::max(t.address[i] / 32, next_sector), high = (last - 1) / 32;
          if (low <= high) sectors += high - low + 1, next_sector = high + 1;
        }
        (sites[site].store ? traffic.stored : traffic.loaded) += bytes;
        (sites[site].store ? traffic.store_sectors : traffic.load_sectors) += sectors;
        ++traffic.transactions;
      }
      transactions[warp][site].clear();
    }
  }
  for (int i = 0; i < thread_count; ++i) std::memset(turns[i], 0, sizeof(uint32_t) * site_count);
}

inline void access(uintptr_t address, size_t size, size_t alignment, bool store, const char* file, int line) {
  Allocation& last = last_allocation;
  if (address < last.first || address + size > last.last) {
    bool found = false;
    for (const Allocation& a : allocations) {
      if (address >= a.first && address + size <= a.last) last = a, found = true;
    }
    if (!found) {
      fail("out of bounds: %s of %zu bytes at line %d", store ? "store" : "load", size, line);
    }
  }
  if (address % alignment) fail("misaligned %s of %zu bytes at line %d", store ? "store" : "load", size, line);
  if (store && !last.writable) fail("store into an input at line %d", line);
  int site = 0;
  while (site < site_count && (sites[site].line != line || sites[site].store != store || sites[site].file != file)) ++site;
  if (site == site_count) {
    if (site == kSites) fail("more than %d places access global memory", kSites);
    sites[site_count++] = {file, line, store};
    for (int i = 0; i < kMaxThreads; ++i) turns[i][site] = 0;
  }
  auto& list = transactions[current->linear / 32][site];
  uint32_t turn = turns[current->linear][site]++;
  if (turn >= list.size()) list.resize(turn + 1);
  Transaction& t = list[turn];
  t.size = std::max<uint16_t>(t.size, size);
  t.address[t.lanes++] = address;
}

// Who touched an element of shared memory, and since which barriers; block_epoch never repeats, so nothing is cleared.
struct Shadow {
  uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
  int16_t writer, reader;
  bool readers_in_warp, readers_elsewhere;
};

alignas(128) inline unsigned char shared_memory[kSharedLimit + (64 << 10)];
inline Shadow shadows[sizeof(shared_memory) / 2];
inline size_t shared_used = sizeof shared_memory;
inline std::vector<std::pair<const void*, void*>> static_arrays;

inline void begin_block(size_t dynamic_shared) {
  std::memset(shared_memory, 0xff, shared_used);  // what lies beyond is poisoned already
  shared_used = (dynamic_shared + 127) / 128 * 128;
  static_arrays.clear();
}

inline void begin_launch() {
  at_barrier = settle_traffic;
  site_count = 0;
}

template <class T>
struct ArrayOf {
  using type = T;
};

inline void* static_array(const void* tag, size_t bytes) {
  for (auto& found : static_arrays) {
    if (found.first == tag) return found.second;
  }
  void* array = shared_memory + shared_used;
  shared_used += (bytes + 127) / 128 * 128;
  if (shared_used > sizeof shared_memory) fail("static shared arrays take %zu bytes", shared_used);
  static_arrays.push_back({tag, array});
  return array;
}

inline Shadow& shadow_of(const void* element, size_t size) {
  size_t offset = static_cast<const unsigned char*>(element) - shared_memory;
  if (offset + size > shared_used) fail("out of bounds: shared memory offset %zd of %zu", ssize_t(offset), shared_used);
  return shadows[offset / 2];
}

inline bool same_warp(int other) { return other / 32 == current->linear / 32; }

inline void shared_read(const void* element, size_t size) {
  Shadow& s = shadow_of(element, size);
  int me = current->linear;
  uint32_t warp_epoch = warps[me / 32].epoch;
  if (s.write_epoch < block_first_epoch) fail("read of unwritten shared memory, offset %zd",
                                              static_cast<const unsigned char*>(element) - shared_memory);
  if (s.write_epoch == block_epoch && s.writer != me && !(same_warp(s.writer) && s.write_warp_epoch != warp_epoch)) {
    fail("race: reads shared memory that thread %d wrote, with no barrier between", s.writer);
  }
  if (s.read_epoch != block_epoch) {
    s = {s.write_epoch, s.write_warp_epoch, block_epoch, warp_epoch, s.writer, int16_t(me), false, false};
  } else if (s.reader != me) {
    if (!same_warp(s.reader)) s.readers_elsewhere = true;
    else if (s.read_warp_epoch == warp_epoch) s.readers_in_warp = true;
    else s.reader = int16_t(me), s.read_warp_epoch = warp_epoch, s.readers_in_warp = false;
  }
}

inline void shared_write(const void* element, size_t size) {
  Shadow& s = shadow_of(element, size);
  int me = current->linear;
  uint32_t warp_epoch = warps[me / 32].epoch;
  if (s.write_epoch == block_epoch && s.writer != me && !(same_warp(s.writer) && s.write_warp_epoch != warp_epoch)) {
    fail("race: writes shared memory that thread %d wrote, with no barrier between", s.writer);
  }
  bool ordered = same_warp(s.reader) && s.read_warp_epoch != warp_epoch && !s.readers_elsewhere;
  if (s.read_epoch == block_epoch && (s.reader != me || s.readers_in_warp || s.readers_elsewhere) && !ordered) {
    fail("race: writes shared memory that thread %d read, with no barrier between", s.reader);
  }
  s.write_epoch = block_epoch;
  s.write_warp_epoch = warp_epoch;
  s.writer = int16_t(me);
}

template <class T>
T atomic(T* address, T (*change)(T, T), T operand, int line) {
  access(reinterpret_cast<uintptr_t>(address), sizeof(T), sizeof(T), true, "atomic", line);
  T old = *address;
  *address = change(old, operand);
  return old;
}

}  // namespace emu

// Integer atomics on global memory only: a floating-point one would make the sum's order, and so its bits, a matter of luck.
template <class T>
T atomicAdd(T* address, T value, int line = __builtin_LINE()) {
  static_assert(std::is_integral_v<T>, "no floating-point atomics");
  return emu::atomic<T>(address, [](T a, T b) { return T(a + b); }, value, line);
}
template <class T>
T atomicMax(T* address, T value, int line = __builtin_LINE()) {
  static_assert(std::is_integral_v<T>, "no floating-point atomics");
  return emu::atomic<T>(address, [](T a, T b) { return a < b ? b : a; }, value, line);
}

template <class T>
struct Shared {
  operator T() const {
    emu::shared_read(this, sizeof(T));
    return value;
  }
  Shared& operator=(T v) {
    emu::shared_write(this, sizeof(T));
    value = v;
    return *this;
  }
  Shared& operator=(const Shared& other) { return *this = T(other); }
  Shared& operator+=(T v) { return *this = T(*this) + v; }
  T value;
};

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float to_float(fp16 x) {
  int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                              : std::ldexp(float(exponent ? fraction | 1024 : fraction), (exponent ? exponent : 1) - 25);
  return x.bits >> 15 ? -size : size;
}
inline fp16 to_fp16(float x) {
  uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  float size = std::fabs(x);
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = std::max(size > 0 ? std::ilogb(size) : -24, -14);
  // in units of the last place; the rounding mode is to nearest even, and a carry into the exponent comes out right
  int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {uint16_t(sign + (units < 1024 ? units : ((exponent + 14) << 10) + units))};
}

extern "C" {
inline __attribute__((used)) const char* emu_error() { return emu::error; }
inline __attribute__((used)) void emu_reset(unsigned seed) {
  emu::error[0] = 0;
  emu::random_order.seed(seed);
  emu::allocations.clear();
  emu::last_allocation = {1, 0, false};
  emu::traffic = {};
  for (auto& warp : emu::transactions) {
    for (auto& list : warp) list.clear();
  }
  std::memset(emu::turns, 0, sizeof emu::turns);
}
inline __attribute__((used)) void emu_register(void* first, int64_t bytes, int writable) {
  uintptr_t address = reinterpret_cast<uintptr_t>(first);
  emu::allocations.push_back({address, address + bytes, writable != 0});
}
inline __attribute__((used)) void emu_traffic(uint64_t* out) { std::memcpy(out, &emu::traffic, sizeof emu::traffic); }
}
