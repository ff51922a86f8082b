"""One process per GPU: serves WorkerService and runs its shard of the model."""
