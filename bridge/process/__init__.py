"""What every process of ours needs: tasks and signals, outages, logs, metrics, health, systemd's notifications."""
