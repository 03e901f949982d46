"""What people look at: MLflow on shared services, metrics of a cluster."""
