"""What runs in a gang's pods: supervisor, engine, api and rank processes."""
