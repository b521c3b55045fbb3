// The scalar kernels, built without any instruction set flags.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define GODWIT_SCALAR 1

namespace godwit {
namespace {

#include "simd_scalar.h"
// After the vectors:
#include "math-inl.h"
// After the elementary functions:
#include "matmul-inl.h"
// After the products:
#include "tiles_scalar.h"
// After the tile products:
#include "attention-inl.h"
#include "slab-inl.h"
// After the passes over a state:
#include "delta-inl.h"
#include "ffn-inl.h"
#include "pack-inl.h"
#include "peak-inl.h"

}  // namespace

const KernelTable kScalarTable = {linear, embed,    rms_norm, gated_delta_net, attention, ffn,
                                  top_k,  multiply, pack};

}  // namespace godwit
