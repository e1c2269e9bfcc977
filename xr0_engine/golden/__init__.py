"""Golden cases: run every one in a folder and measure how far this build is from it.

The folder's format: `<model>.json` sizes, `<model>.weights.safetensors` under checkpoint names,
`<model>.<case>.safetensors` inputs and expected results; and `<name>.safetensors` beside `<name>.py`, an action head of
published sizes whose weights and inputs the script makes from seeds, with results named `<mode>.prefix<P>.actions`. The
scripts are executed. A folder may hold cases of both families of models.
"""
