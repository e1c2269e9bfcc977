#include "xr0/rows_generic.h"

namespace xr0 {

const RowFunctions kRowsPortable{"portable",          horizontal_generic,     vertical_generic,
                                 emit_generic<float>, emit_generic<Bfloat16>, emit_generic<Float16>};

}  // namespace xr0
