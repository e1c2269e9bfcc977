#include "xr0/rows_generic.h"

namespace xr0 {

const RowFunctions kRowsPortable{"portable", horizontal_generic, vertical_generic, emit_generic<float>,
                                 emit_generic<uint16_t>};

}  // namespace xr0
