//go:build !linux

package clock

import "time"

func machine() (boot string, uptime func() time.Duration) { return sinceStart() }
