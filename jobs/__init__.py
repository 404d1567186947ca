"""What happens to one job: spec, queue, runner, stages, report. HTTP is service's, the mathematics kbop_core's."""
