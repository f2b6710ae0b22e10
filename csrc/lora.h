// LoRA's own work around a projection, arXiv:2106.09685: skinny products, and filling what is folded into the large ones.
#pragma once

#include "ferrotune/csrc/linear.h"
#include "ferrotune/kernels/kernels.h"

namespace ferrotune {

// The parts that have LoRA, and where they stand: part p has columns column..column + R of z and rows row..row + rows of W.
struct LoraPlaces {
  struct Place {
    const Lora* lora;
    int64_t row, column, rank;
  };
  std::vector<Place> places;
  int64_t rank = 0;  // of all parts together
  bool drops = false;

  explicit LoraPlaces(const Linear& l);
};

struct LoraParts : LoraPlaces {
  Tensor a;  // [rank, in], the A_p below each other, so that X is read once for all parts

  LoraParts(const Linear& l, at::ScalarType dtype);
};

// What LoRA adds to columns row .. of y: s x A^T B^T, A [R, in], B [rows, R].
struct LoraAddend {
  int64_t row;
  Tensor a, b;
  double scale;
};

// What all of them add, each to columns of its own; without autograd. On a GPU in 16 bits these are two launches, the first at once, so that it
// overlaps with the kernel before it if the product follows.
class LoraSum {
 public:
  LoraSum(Tensor x, std::vector<LoraAddend> addends);
  // y += it, and the residual; once.
  void add_to(const Tensor& y, const Tensor& residual = {});

 private:
  bool launched(const Tensor& y);

  Tensor x, z;
  std::vector<LoraAddend> addends;
  std::optional<KernelLoraAdd> operands;
};

// alpha a b as the gradient of a weight of type `type`. On a GPU the f32 sums of 16-bit operands are stored as they are: no
// rounding, and no kernel for the scale and none for the cast.
Tensor weight_gradient(const Tensor& a, const Tensor& b, double alpha, at::ScalarType type);

// Writes G = [s_p dY_p B_p] into the first `rank` columns of g, and zero into its others; returns dB_p = s_p dY_p^T Z_p for each
// place, undefined where B does not train. dy [N, rows], whose rows may lie apart.
std::vector<Tensor> lora_gradients(const Tensor& dy, const Tensor& z, const LoraParts& lora, const Tensor& g);

// The same with dB_p into db[p] [rows, R], where that is defined.
void lora_gradients_into(const Tensor& dy, const Tensor& z, const LoraParts& lora, const Tensor& g,
                         const std::vector<Tensor>& db);

// For [X | Z] [W | s B]^T: behind Z zero; s_p B_p in the columns of Z_p behind W, zero around them. [N, tail], [rows, tail].
void lora_fill_columns(const Tensor& behind_x, const Tensor& behind_w, const LoraPlaces& lora);

// The same with Z = [X A_p^T], all of it one launch for some hundred rows at most: of its own, or the one of rms_norm_fold, which makes X.
struct LoraFold {
  std::optional<KernelLoraAdd> z;  // none where no kernel does it
  std::vector<KernelFill> fills;
  TensorList bs;  // keeps copies for as long as they are read

  LoraFold(const Tensor& x, const Tensor& behind_x, const Tensor& behind_w, const LoraPlaces& lora);
  int64_t count() const { return static_cast<int64_t>(fills.size()); }
};

// By a launch of its own; false where no kernel does it.
bool lora_fold(const Tensor& x, const LoraFold& fold);

// For [dY | G] [W; A]: A below W, then zero. [tail, in].
void lora_fill_rows(const Tensor& below_w, const LoraParts& lora);

}  // namespace ferrotune
