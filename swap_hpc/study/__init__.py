"""What runs show: reports and figures of one, tables over many."""
