"""The KV pipe: tensors from one gang's rank into another's."""
