"""What ``qlora bench`` runs: contenders beside each other in one process, against limits measured in the same run."""
