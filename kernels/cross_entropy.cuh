// Cross-entropy of a row of logits: the formula, for every kernel file that cuts a row its own way.
//
// Columns from `classes` on are padding: whatever they hold, they take no part, and their gradient
// is 0. With log Z = log sum exp(logit),
//   loss = log Z - logit[target] + z_loss (log Z)^2,
//   d_logit = scale (softmax (1 + 2 z_loss log Z) - [column = target]).
// A thread holds vectors of 16 bytes, each of which is loaded, and written, by the same thread.
#pragma once

constexpr int IGNORE_INDEX = -100;  // a target: loss and gradient of its row are 0
DEVICE float not_a_number() { return __uint_as_float(0x7fffffffu); }

// ---------------------------------------------------------------- vectors of logits
// Replaces what lies in columns from `classes` on; `first` is the column of values[0].
template <int COUNT>
DEVICE void replace_padding(float (&values)[COUNT], int first, int classes, float by) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j)
    if (first + j >= classes) values[j] = by;
}

// The thread's vectors of a row, number at(i) each; -inf, which exp makes 0, where there is no
// class. All of them are on their way before the first is looked at.
template <class T, int VECTORS, class At>
DEVICE void load_vectors(const uint4* row, int classes, const At& at, uint4 (&held)[VECTORS]) {
  constexpr uint32_t NOTHING = sizeof(T) == 2 ? 0xff80ff80u : 0xff800000u;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    held[i] = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
    if (at(i) * VALUES<T> < classes) held[i] = row[at(i)];
  }
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int first = at(i) * VALUES<T>;
    if (first < classes && classes < first + VALUES<T>) {
      float values[VALUES<T>];
      unpack(held[i], values);
      replace_padding(values, first, classes, __uint_as_float(0xff800000u));
      held[i] = pack(values);
    }
  }
}

// The target's logit, NaN where the target is no class.
template <class T>
DEVICE float target_logit(const T* row, int target, int classes) {
  if (uint32_t(target) >= uint32_t(classes)) return not_a_number();
  if constexpr (sizeof(T) == 2)
    return to_float(row[target]);
  else
    return row[target];
}

// ---------------------------------------------------------------- softmax
// The part of Z that some columns make: exp(max) sum. A maximum is never -inf, so that no column
// at all needs no case of its own.
struct Partition {
  float max = -3.4028234663852886e38f, sum = 0;
};

// exp(x) for a difference to a maximum, which is taken before the scaling to base 2: scaled alone,
// large logits would lose what tells them apart.
DEVICE float exp_of(float difference) { return exp2_approx(difference * 1.4426950408889634f); }

// Both, in this order (online softmax; Milakov and Gimelshein 2018, algorithm 3).
DEVICE Partition joined(Partition first, Partition second) {
  const float max = fmaxf(first.max, second.max);
  return {max, first.sum * exp_of(first.max - max) + second.sum * exp_of(second.max - max)};
}
// The columns of a vector, after those before it.
template <class T>
DEVICE Partition joined(Partition own, uint4 vector) {
  float values[VALUES<T>];
  unpack(vector, values);
  float max = own.max;
#pragma unroll
  for (int j = 0; j < VALUES<T>; ++j) max = fmaxf(max, values[j]);
  float sum = own.sum * exp_of(own.max - max);
#pragma unroll
  for (int j = 0; j < VALUES<T>; ++j) sum += exp_of(values[j] - max);
  return {max, sum};
}
DEVICE Partition warp_partition(Partition own) {
  const float max = warp_max(own.max);
  return {max, warp_sum(own.sum * exp_of(own.max - max))};
}

// ---------------------------------------------------------------- loss and gradient
DEVICE float row_loss(Partition z, float target, float z_loss) {
  const float log_sum = logf(z.sum), log_z = z.max + log_sum;
  // Not log_z - target: between large logits that would keep no digit of the loss. What is small
  // is added first.
  return (z.max - target) + (log_sum + z_loss * log_z * log_z);
}

struct RowGradient {
  float max, of_exp, of_target;
  int target, classes;
};
DEVICE RowGradient row_gradient(Partition z, int target, int classes, float scale, float z_loss) {
  const float log_z = z.max + logf(z.sum);
  float of_exp = __fdiv_rn(scale * (1.0f + 2.0f * z_loss * log_z), z.sum);
  if (uint32_t(target) >= uint32_t(classes)) of_exp = not_a_number();
  return {z.max, of_exp, scale, target, classes};
}
// Of a vector of logits, of which `first` is the column of the first.
template <class T>
DEVICE uint4 gradient_of(const RowGradient& row, uint4 logits, int first) {
  float values[VALUES<T>];
  unpack(logits, values);
#pragma unroll
  for (int j = 0; j < VALUES<T>; ++j) values[j] = exp_of(values[j] - row.max) * row.of_exp;
  if (uint32_t(row.target - first) < uint32_t(VALUES<T>)) {
#pragma unroll
    for (int j = 0; j < VALUES<T>; ++j)
      if (first + j == row.target) values[j] -= row.of_target;
  }
  replace_padding(values, first, row.classes, 0);  // 0 times a NaN would not be 0
  return pack(values);
}
