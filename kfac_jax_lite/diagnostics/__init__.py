"""Reports, logs, costs and the doctor."""
