"""The containers themselves: directories of safetensors, GGUF files, imatrix files, and the places of tensors in files
that are being written. Bytes and headers; nothing here knows what a model is.
"""
