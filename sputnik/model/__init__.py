"""The DeepSeek-V3 network and its dense relatives, one `Transformer`; Hugging Face checkpoints in and out."""
