"""Which code runs where: what this process and every worker process import, compared and recorded."""
