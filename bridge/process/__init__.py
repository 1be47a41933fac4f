"""What others see of the daemons: logs, metrics, health, traces, systemd's notifications."""
