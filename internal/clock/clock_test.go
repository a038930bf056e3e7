package clock

import (
	"testing"
	"time"
)

// Invariant 12: the clock was set by an hour between two runs. Steady time does
// not notice.
func TestSteadyTimeGoesOnFromRunToRun(t *testing.T) {
	_, first := System(Anchor{})
	if first.Boot == "" {
		t.Skip("this machine does not name its start")
	}
	first.Steady = first.Steady.Add(-time.Hour) // as the run before the step saw it
	c, second := System(first)
	if second != first {
		t.Errorf("anchor %+v became %+v", first, second)
	}
	if ahead := c.Steady().Sub(first.Steady); ahead < 0 || ahead > time.Minute {
		t.Errorf("steady time went on by %s", ahead)
	}
}

func TestAnotherStartOfTheMachineDoesNotTurnSteadyTimeBack(t *testing.T) {
	later := time.Now().Add(time.Hour).UTC().Round(0)
	c, a := System(Anchor{Boot: "another", Uptime: time.Hour, Steady: later})
	if a.Boot == "another" || a.Steady.Before(later) || c.Steady().Before(later) {
		t.Errorf("anchor %+v, steady time %s, want from %s on", a, c.Steady(), later)
	}
}

func TestADeadlinePassesByEitherClock(t *testing.T) {
	wall := time.Date(2026, 5, 29, 12, 0, 0, 0, time.UTC)
	steady := wall
	c := Clock{Wall: func() time.Time { return wall }, Steady: func() time.Time { return steady }}
	d := c.In(10 * time.Second)
	for _, step := range []struct {
		wall, steady time.Duration
		passed       bool
	}{
		{0, 0, false}, {9 * time.Second, 9 * time.Second, false}, {10 * time.Second, 0, true},
		{0, 10 * time.Second, true}, {-time.Hour, 11 * time.Second, true}, {time.Hour, time.Second, true},
	} {
		wall, steady = d.Wall.Add(step.wall-10*time.Second), d.Steady.Add(step.steady-10*time.Second)
		if c.Passed(d) != step.passed {
			t.Errorf("wall %s, steady %s after: passed %t", step.wall, step.steady, !step.passed)
		}
	}
}
