package clock

import "time"

// sinceStart is for machines that do not name their start: steady time then
// begins anew, by the wall clock, with each run.
func sinceStart() (boot string, uptime func() time.Duration) {
	start := time.Now() // carries a monotonic reading
	return "", func() time.Duration { return time.Since(start) }
}
