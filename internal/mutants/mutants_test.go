//go:build mutants

// Package mutants breaks openlock on purpose, in copies, and shows that the
// tests notice. Run it with `make mutants`.
package mutants

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mutant is one deliberate breakage and the tests that must fail on it.
type mutant struct {
	name     string
	file     string
	old, new string // old stands in file exactly once
	pkg, run string
	also     *mutant // made together with this one
}

// Shown whatever this process did not stage: alone, and with a recovery that
// leaves it there.
var showsAll = mutant{
	name: "what this process did not stage is shown", file: "internal/shadow/service.go",
	old: "ok && l.id == commandID(raw) && !s.clock.Passed(l.until)", new: "ok || commandID(raw) != \"\"",
	pkg: "./internal/shadow", run: "TestDeadCommandIsShownToNobody",
}

var mutants = []mutant{
	{
		"publish before commit", "internal/control/open.go",
		"	records, err := c.db.Commit(ctx, change)\n	if err != nil {\n		staged.Drop()\n",
		"	if err := staged.Send(); err != nil {\n		return Answer{}, err\n	}\n	staged, _ = c.shadows.Stage(ctx, state.ThingName, shadow.Command{ID: string(open.ID), IssuedAt: r.Received.Wall, Until: until})\n	records, err := c.db.Commit(ctx, change)\n	if err != nil {\n		staged.Drop()\n",
		"./cmd/openlock", "TestASyncReturnsBeforeTheAnswer|TestKilledAtAnyMoment", nil,
	},
	{
		"answer without a sync to disk", "internal/store/store.go",
		"synchronous(FULL)", "synchronous(OFF)",
		"./cmd/openlock", "TestASyncReturnsBeforeTheAnswer", nil,
	},
	{
		"no expiry check in the device", "internal/device/rules.go",
		"case !now.Before(c.ExpiresAt):", "case false:",
		"./internal/device", "TestDecide|TestNothingOpensLate", nil,
	},
	{
		"the device forgets what it has seen", "internal/device/rules.go",
		"	if s.Seen {\n", "	if false {\n",
		"./internal/device", "TestNothingOpensTwice|TestDecide", nil,
	},
	{
		"the bolt moves before its id is durable", "internal/device/device.go",
		"	if err := d.journal.put(record{Command: c, At: d.wall().UnixMilli()}); err != nil {\n		return err\n	}\n", "",
		"./internal/device", "TestNothingOpensTwice|TestNoMemoryNoOpening|TestOpensReportsAndRelocks", nil,
	},
	{
		"recovery leaves commands unfinished", "internal/control/outcome.go",
		"	if err != nil || len(rows) == 0 {\n		return 0, err\n	}\n", "	if err != nil || len(rows) >= 0 {\n		return 0, err\n	}\n",
		"./internal/control", "Simulation", nil,
	},
	showsAll,
	{
		"recovery sends again", "internal/control/outcome.go",
		"	if err != nil || len(rows) == 0 {\n		return 0, err\n	}\n", "	if err != nil || len(rows) >= 0 {\n		return 0, err\n	}\n",
		"./internal/control", "Simulation", &showsAll,
	},
	{
		"repeats open again", "internal/control/open.go",
		"	if prior != nil {\n", "	if false {\n",
		"./cmd/openlock", "TestARepeatIsTheSameCommand|TestConcurrentRepeatsAreOneCommand", nil,
	},
	{
		"the window of a requestId by the wall clock", "internal/control/repeat.go",
		"c.clock.Steady().Sub(cmd.EndedAt) < c.settings.Window", "c.clock.Wall().Sub(cmd.EndedAt) < c.settings.Window",
		"./internal/control", "Simulation", nil,
	},
	{
		"a command is withdrawn from nobody", "internal/control/control.go",
		"		if access.Stands(access.Right(open.Right), facts) {\n", "		if access.Stands(access.Right(open.Right), facts) || true {\n",
		"./internal/control", "Simulation", nil,
	},
	{
		"a newer command is cleared with an older one", "internal/shadow/command.go",
		"!ok || commandID(raw) != id {", "!ok || len(raw) == 0 {",
		"./internal/shadow", "TestWithdrawLeavesANewerCommandAlone", nil,
	},
	{
		"anybody may write the command", "internal/shadow/service.go",
		"	if commands(a, u, before) {\n", "	if false {\n",
		"./internal/shadow", "TestOnlyStageWritesTheCommand", nil,
	},
	{
		"anybody may report the outcome", "internal/shadow/service.go",
		"	if from != a.Thing {\n", "	if false {\n",
		"./internal/shadow", "TestOnlyTheDeviceReports", nil,
	},
	{
		"a report is accepted before it is recorded", "internal/shadow/service.go",
		"	return s.reports(ctx, a.Thing, r)\n", "	_ = s.reports(ctx, a.Thing, r)\n	return nil\n",
		"./internal/shadow", "TestReportThatCannotBeRecorded", nil,
	},
	{
		"a command may have two outcomes", "internal/lock/decide.go",
		"	if _, ok := s.pending(c.CommandID); !ok {\n		return nil, nil\n	}\n", "",
		"./internal/lock", "TestDecide|TestAnyHistory", nil,
	},
	{
		"an expired command is written", "internal/broker/outbox.go",
		"if m.until == nil || !o.wire.clock.Passed(*m.until) {", "if true {",
		"./internal/broker", "TestPauseBetweenQueueAndWrite|TestNothingIsWrittenAfterTheDeadline", nil,
	},
	{
		"no reset at the deadline", "internal/broker/outbox.go",
		"		case o.wire.clock.Passed(*m.until):\n			o.shut()\n			o.wire.reset()\n", "		case false:\n",
		"./internal/broker", "TestUnacknowledgedCommandResetsTheConnection|TestHalfOpenLink", nil,
	},
	{
		"a polite close instead of a reset", "internal/broker/wire.go",
		"	_ = w.SetLinger(0)\n", "",
		"./internal/broker", "TestUnacknowledgedCommandResetsTheConnection|TestHalfOpenLink", nil,
	},
	{
		"retained publish", "internal/broker/outbox.go",
		"Type: packets.Publish, Qos: m.qos}", "Type: packets.Publish, Qos: m.qos, Retain: true}",
		"./internal/broker", "TestCommandOnTheWire|TestNothingIsRetained", nil,
	},
	{
		"a Last Will on another's topic", "internal/broker/session.go",
		"case pk.Connect.WillFlag && !mayPublish(s.thing, pk.Connect.WillTopic):", "case false:",
		"./internal/broker", "TestLastWillOnlyOnOwnRequests", nil,
	},
	{
		"any client id", "internal/broker/session.go",
		"!shadow.ValidThing(s.thing) || pk.Connect.ClientIdentifier != s.thing", "!shadow.ValidThing(s.thing)",
		"./internal/broker", "TestClientIDMustBeTheNameInTheCertificate", nil,
	},
	{
		"rights are not looked at when recording", "internal/store/change.go",
		"	if err := c.Requires.check(tx); err != nil {\n		return err\n	}\n", "",
		"./internal/store", "TestStanding", nil,
	},
	{
		"another organization may open", "internal/access/access.go",
		"s.Org == l.Org && s.has(a)", "s.has(a)",
		"./internal/access", "TestMay", nil,
	},
}

func TestEveryMutantIsCaught(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	copied := t.TempDir()
	if out, err := exec.Command("sh", "-c", "cd "+root+" && git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t "+copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	caught := 0
	for _, m := range mutants {
		if m.caught(t, copied) {
			caught++
		}
	}
	t.Logf("%d mutants, %d caught", len(mutants), caught)
}

// caught applies the mutant, runs its tests and takes it back.
func (m mutant) caught(t *testing.T, root string) bool {
	t.Helper()
	for part := &m; part != nil; part = part.also {
		defer part.apply(t, root)()
	}
	return m.judged(t, root)
}

// apply breaks the copy, until undo is called.
func (m mutant) apply(t *testing.T, root string) (undo func()) {
	t.Helper()
	path := filepath.Join(root, m.file)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(good), m.old); n != 1 {
		t.Fatalf("%s: what it replaces stands %d times in %s", m.name, n, m.file)
	}
	write := func(content []byte) {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write([]byte(strings.Replace(string(good), m.old, m.new, 1)))
	return func() { write(good) }
}

func (m mutant) judged(t *testing.T, root string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-vet=off", "-timeout=2m", "-run", m.run, m.pkg)
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil:
		t.Errorf("NOT CAUGHT: %s\n%s", m.name, out)
	case bytes.Contains(out, []byte("[build failed]")) || bytes.Contains(out, []byte("[setup failed]")):
		t.Errorf("%s does not build:\n%s", m.name, out)
	default:
		t.Logf("caught: %s", m.name)
		return true
	}
	return false
}
