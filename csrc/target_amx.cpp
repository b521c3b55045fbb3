// The kernels for AVX-512 with the tile unit (AMX) for int8 and bf16.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define GODWIT_AVX512 1
#define GODWIT_AMX 1

namespace godwit {
namespace {

#include "simd_avx512.h"
// After the vectors:
#include "math-inl.h"
// After the elementary functions:
#include "matmul-inl.h"
// After the products:
#include "tiles_avx512.h"
// After the vector products, which it uses for small products:
#include "tiles_amx.h"
// After the parts of it that both use:
#include "tiles_amx_q4.h"
// After the tile products:
#include "attention-inl.h"
#include "slab-inl.h"
// After the passes over a state:
#include "delta-inl.h"
#include "ffn-inl.h"
#include "pack-inl.h"
#include "peak-inl.h"

}  // namespace

const KernelTable kAmxTable = {linear, embed,    rms_norm, gated_delta_net, attention, ffn,
                               top_k,  multiply, pack};

}  // namespace godwit
