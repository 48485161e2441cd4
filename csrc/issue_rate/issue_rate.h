// How many vector instructions a second this machine issues: the unit of the critic's floor (bench/floor.py).
//
// Independent multiplications, maxima and additions, two to one to one, at the full width of the
// instruction set, on registers alone.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace ck {

struct IssueRate {
  int64_t iterations;  // of the loop, on every thread
  int32_t threads;
  int64_t* issued;  // (1,) the vector instructions of one thread
};

CK_DECLARE(issue_rate, IssueRate)

}  // namespace ck
