package clock

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine names this start of the machine and tells its uptime, sleep included
// (clock_gettime(2), CLOCK_BOOTTIME).
func machine() (boot string, uptime func() time.Duration) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return sinceStart()
	}
	return strings.TrimSpace(string(id)), func() time.Duration {
		var t unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
			panic("clock: CLOCK_BOOTTIME: " + err.Error()) // every Linux that Go runs on has it
		}
		return time.Duration(t.Nano())
	}
}
