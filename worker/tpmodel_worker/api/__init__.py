"""The client side of the leader pod: gRPC, HTTP, tokenizer, templates, detokenizer. Imports no torch."""
