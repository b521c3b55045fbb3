// Scalar definitions of round_group and tile_products. Included after matmul-inl.h.

inline int32_t top_bits(const float* x, int64_t count) {
  int32_t top = 0;
  for (int64_t i = 0; i < count * kGroup; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffff;
    if (bits > top) top = bits;
  }
  return top;
}

inline int32_t round_group(const float* x, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    q[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
    sum += q[i];
  }
  return sum;
}

inline float bf16_product(const uint8_t* tile, const Rows& x, int64_t i, int64_t r) {
  const auto* w = reinterpret_cast<const uint16_t*>(tile);
  const float* a = x.f + i * x.f_stride;
  float even = 0, odd = 0;
  for (int64_t v = 0; v < groups(x.cols) * kGroup / 2; ++v) {
    even = std::fma(from_bf16(w[32 * v + 2 * r]), a[2 * v], even);
    odd = std::fma(from_bf16(w[32 * v + 2 * r + 1]), a[2 * v + 1], odd);
  }
  return even + odd;
}

// q4 and q8: `share` groups have one scale.
inline float integer_product(Format format, int64_t share, const uint8_t* tile, const int8_t* q,
                             const float* scale, int64_t n, int64_t r) {
  const uint16_t* scales = tile_scales(format, tile, n);
  float total = 0;
  for (int64_t first = 0; first < n; first += share, ++scale, scales += kTileRows) {
    int32_t dot = 0;
    for (int64_t g = first; g < n && g < first + share; ++g) {
      for (int64_t c = 0; c < kGroup; ++c) dot += tile_code(format, tile, n, g, r, c) * q[g * kGroup + c];
    }
    total = std::fma(static_cast<float>(dot), half_to_float(scales[r]) * *scale, total);
  }
  return total + 0.0F;
}

inline float plain_product(Format format, const uint8_t* tile, const Rows& x, int64_t i, int64_t r) {
  const int64_t n = groups(x.cols);
  if (format == Format::bf16) return bf16_product(tile, x, i, r);
  if (format == Format::q8) {
    const GroupCodes row = skip(x.q8, x.cols, i);
    return integer_product(format, 1, tile, row.q, row.scale, n, r);
  }
  const SpanCodes row = skip(x.q4, x.cols, i);
  return integer_product(format, kSpan, tile, row.q, row.scale, n, r);
}

inline void tile_products(Format format, const uint8_t* tiles, int64_t, const uint8_t*, const Rows& x,
                          float* out, int64_t out_stride, int64_t width) {
  for (int64_t i = 0; i < x.m; ++i) {
    for (int64_t r = 0; r < width; ++r) {
      const uint8_t* tile = tiles + r / kTileRows * tile_bytes(format, x.cols);
      out[i * out_stride + r] = plain_product(format, tile, x, i, r % kTileRows);
    }
  }
}
