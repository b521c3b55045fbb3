// The plain meaning of quantize_group and tile_products. Included after matmul-inl.h.

inline void quantize_group(const float* x, int8_t* q, float* scale, int32_t* sum) {
  float top = 0;
  bool finite = true;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float a = std::fabs(x[i]);
    if (a > top) top = a;
    finite = finite && a < HUGE_VALF;
  }
  const float inverse = finite && top >= kLeast ? 127.0F / top : 0.0F;
  *scale = finite ? top / 127.0F : std::nanf("");
  *sum = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    q[i] = finite ? static_cast<int8_t>(std::nearbyint(x[i] * inverse)) : int8_t{0};
    *sum += q[i];
  }
}

inline float plain_product(Format format, const uint8_t* tile, const Rows& x, int64_t i, int64_t r) {
  const int64_t n = groups(x.cols);
  const auto* scales = reinterpret_cast<const uint16_t*>(tile + n * code_bytes(format));
  float even = 0, odd = 0;
  for (int64_t g = 0; g < n; ++g) {
    const uint8_t* group = tile + g * code_bytes(format);
    if (format == Format::bf16) {
      const auto* w = reinterpret_cast<const uint16_t*>(group);
      const float* a = x.f + i * x.f_stride + g * kGroup;
      for (int64_t v = 0; v < 16; ++v) {
        even = std::fma(from_bf16(w[32 * v + 2 * r]), a[2 * v], even);
        odd = std::fma(from_bf16(w[32 * v + 2 * r + 1]), a[2 * v + 1], odd);
      }
      continue;
    }
    const int8_t* q = x.q + (i * n + g) * kGroup;
    int32_t total = 0;
    for (int64_t c = 0; c < kGroup; ++c) total += tile_code(format, group, r, c) * q[c];
    even = std::fma(static_cast<float>(total), half_to_float(scales[g * kTileRows + r]) * x.scale[i * n + g],
                    even);
  }
  return even + odd;
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
