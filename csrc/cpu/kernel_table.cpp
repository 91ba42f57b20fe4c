// The only place that names the table of every instruction set.
#include "kernels.h"

namespace ffn_ops {

namespace baseline {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}
#endif

const KernelTable* kernel_table(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return &baseline::kTable;
#if defined(__x86_64__)
    case Isa::avx2:
      return &avx2::kTable;
    case Isa::avx512:
      return &avx512::kTable;
    case Isa::avx512_bf16:
      return &avx512_bf16::kTable;
#else
    default:
      return nullptr;
#endif
  }
  return nullptr;
}

}  // namespace ffn_ops
