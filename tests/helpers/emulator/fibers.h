// The threads of a block as fibers. A fiber goes on until it waits for something that has not come,
// or lets others go first: which of them comes next never depends on time. If none can go on, the
// next block does; if no block can, the launch ends with an error.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

namespace emulator {
struct Dim {
  unsigned x, y, z;
};
struct Warp {
  struct Slot {
    unsigned long long count[32] = {};
    alignas(16) unsigned char value[2][32][64];
  };
  std::map<unsigned, Slot> slots;
};
using Work = std::function<void()>;
struct Fiber {
  ucontext_t context = {};
  bool is_done = false;
  unsigned long long syncs = 0;
  // What it waits for and in which line; null if it waits for nothing
  bool (*has_come)(const void*) = nullptr;
  const void* awaited = nullptr;
  const char* file = nullptr;
  int line = 0;
  std::pair<const unsigned*, unsigned> loaded;  // the last counter, and its value
  // What it has begun that goes on beside it, in groups: the last one is not committed yet
  std::vector<std::vector<Work>> groups{1};
};
struct State {
  int threads;
  Dim block, grid;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int current;
  char* smem;
  void (*body)(void*);
  void* data;
  std::vector<Work> copies;  // of TMA, which begins with the last one: there is no order
  // Threads that go on only when no other can
  int slow_begin, slow_end;
  long long switches;
  char error[1000];  // empty if there is none
};
inline State state;
inline ucontext_t main_context;
// Blocks that have begun and are not done, or are still to begin, but for the current one; and how
// many have been found in a row in which no thread can go on
inline std::deque<State> other_blocks;
inline size_t stuck_in_a_row;
constexpr int kTma = -1;  // the number of the thread that TMA is

inline Dim thread_index() { return {unsigned(state.current), 0, 0}; }
inline Fiber& fiber() { return state.fibers[state.current]; }

// Ends the launch, from within a fiber.
[[noreturn]] inline void fail(const char* error) {
  snprintf(state.error, sizeof(state.error), "thread %d: %s", state.current, error);
  setcontext(&main_context);
  abort();
}
// Where threads wait: the first of several that do so in the same line stands for them.
[[noreturn]] inline void fail_stuck() {
  char error[sizeof(state.error)];
  int size = snprintf(error, sizeof(error), "no thread can go on; waiting:");
  const Fiber* last = nullptr;
  for (int t = 0; t < state.threads; ++t) {
    const Fiber& each = state.fibers[t];
    if (each.is_done) continue;
    const bool is_new = !last || each.file != last->file || each.line != last->line;
    if (is_new && size < int(sizeof(error)))
      size += snprintf(error + size, sizeof(error) - size, " %d at %s:%d", t, each.file, each.line);
    last = &each;
  }
  fail(error);
}
inline bool is_slow(int thread) { return state.slow_begin <= thread && thread < state.slow_end; }
// The next thread, in a circle, that can go on; -1 if there is none. TMA has worked before.
inline int next_thread() {
  for (bool slow : {false, true}) {
    if (is_slow(kTma) == slow && !state.copies.empty()) {
      const Work copy = std::move(state.copies.back());
      state.copies.pop_back();
      copy();
      return next_thread();
    }
    for (int i = 0, t = state.current; i < state.threads; ++i) {
      t = t + 1 == state.threads ? 0 : t + 1;
      const Fiber& each = state.fibers[t];
      if (is_slow(t) == slow && !each.is_done && (!each.has_come || each.has_come(each.awaited)))
        return t;
    }
  }
  return -1;
}
// The next block, in a circle, becomes the current one; returns the context to go on in.
inline ucontext_t* next_block(bool comes_back = true) {
  if (comes_back) other_blocks.push_back(std::move(state));
  state = std::move(other_blocks.front());
  other_blocks.pop_front();
  return &state.fibers[state.current].context;
}
// Lets all other blocks go on before this one does.
inline void yield_to_blocks() {
  ucontext_t* mine = &fiber().context;  // where it is, wherever the state is
  if (!other_blocks.empty()) swapcontext(mine, next_block());
}
// Lets others go on that can.
inline void yield() {
  const int me = state.current;
  int next;
  while ((next = next_thread()) < 0) {
    if (stuck_in_a_row++ >= other_blocks.size()) fail_stuck();
    yield_to_blocks();
  }
  stuck_in_a_row = 0;
  if (++state.switches > 1'000'000'000) fail("it takes too long");
  state.current = next;
  if (next != me) swapcontext(&state.fibers[me].context, &state.fibers[next].context);
}
// Waits until has_come() is true. The line is where the function was called that has it as default
// argument.
template <typename HasCome>
void wait_until(const HasCome& has_come, const char* file, int line) {
  if (has_come()) return;
  Fiber& me = fiber();
  me.has_come = [](const void* awaited) { return (*static_cast<const HasCome*>(awaited))(); };
  me.awaited = &has_come, me.file = file, me.line = line;
  do yield();
  while (!has_come());
  me.has_come = nullptr;
}
inline void sync_threads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto mine = ++fiber().syncs;
  const auto all_came = [mine] {
    for (const Fiber& each : state.fibers)
      if (!each.is_done && each.syncs < mine) return false;
    return true;
  };
  wait_until(all_came, file, line);
}
// Work that goes on beside a thread is done when the thread waits for its group: as late as may be,
// so that what has been overwritten until then, or read before, is wrong.
inline void begin(Work work) { fiber().groups.back().push_back(std::move(work)); }
inline void commit_group() { fiber().groups.emplace_back(); }
// Waits until at most `pending` of the committed groups are unfinished.
inline void wait_for_groups(unsigned pending) {
  yield();
  auto& groups = fiber().groups;
  for (; groups.size() > pending + 1; groups.erase(groups.begin()))
    for (const Work& work : groups.front()) work();
}
}  // namespace emulator
