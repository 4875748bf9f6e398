// What meetings.cpp needs of the scheduler.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {

// Makes a thread the one that runs, in all but the processor's registers.
void enter(unsigned thread);
// Gives the processor to the next ready thread, or back to the launcher when there is none.
void switch_from(unsigned thread);
// Puts the threads into the queue in a random order, before or behind the threads that wait there.
void release(unsigned* threads, size_t count, bool front);
void set_fault(const std::string& kind, const std::string& what);

// All threads wait, so none will ever go on: says who waits where, and who has exited.
void report_stuck();

}  // namespace emulator
