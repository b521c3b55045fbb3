// The kernels for AVX2, FMA and F16C.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define GODWIT_AVX2 1

namespace godwit {
namespace {

#include "simd_avx2.h"
// After the vectors:
#include "math-inl.h"
// After the elementary functions:
#include "matmul-inl.h"
// After the products:
#include "tiles_avx2.h"
// After the tile products:
#include "attention-inl.h"
#include "slab-inl.h"
// After the passes over a state:
#include "delta-inl.h"
#include "ffn-inl.h"
#include "pack-inl.h"
#include "peak-inl.h"

}  // namespace

const KernelTable kAvx2Table = {linear, embed,    rms_norm, gated_delta_net, attention, ffn,
                                top_k,  multiply, pack};

}  // namespace godwit
