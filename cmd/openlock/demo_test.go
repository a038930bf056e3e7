package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// startDemo starts the demo with a folder for what it leaves behind.
func startDemo(t *testing.T, args ...string) (p *program, temp string) {
	t.Helper()
	temp = t.TempDir()
	cmd := exec.Command(binary(t), append([]string{"demo"}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+temp)
	return launch(t, cmd), temp
}

// empty fails the test when the demo has left something behind.
func empty(t *testing.T, temp string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(temp, "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

func TestDemoOnce(t *testing.T) {
	p, temp := startDemo(t, "--once", "--http", "127.0.0.1:0")
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	const at = `\n  [0-9:.]{12} +\+[0-9]+ ms  `
	p.await(p.stdout, `\nPOST /locks/123/OpenLock`+
		at+`recorded  LockOpenRequested, durable, version 2`+
		at+`sent      200, command [0-9a-f-]{36}`+
		at+`opened    the device moved its bolt\n`)
	p.await(p.stdout, `\nThe door is open\.\n$`)
	if said := p.stderr.String(); said != "" {
		t.Errorf("it complains: %s", said)
	}
	empty(t, temp)
}

// What the demo prints is typed into a shell, twice.
func TestDemoInvitesToOpenAgain(t *testing.T) {
	p, temp := startDemo(t, "--http", "127.0.0.1:0")
	seen := map[string]bool{p.await(p.stdout, `sent      200, command (\S+)\n`)[1]: true}
	invitation := p.await(p.stdout, `\n(curl (?s:.*?)'\{.*\}')\n`)[1]
	if left, err := os.ReadDir(temp); err != nil || len(left) != 1 {
		t.Errorf("the demo should work in one folder here, there are %v (%v)", left, err)
	}
	for range 2 {
		answer, err := exec.CommandContext(t.Context(), "sh", "-c", invitation).Output()
		if err != nil {
			t.Fatalf("the printed curl: %v (it needs: apt-get install curl, which make test does)", err)
		}
		var opened struct{ Command struct{ ID string } }
		if err := json.Unmarshal(answer, &opened); err != nil || opened.Command.ID == "" {
			t.Fatalf("answer %s: %v", answer, err)
		}
		if seen[opened.Command.ID] {
			t.Errorf("command %s again", opened.Command.ID)
		}
		seen[opened.Command.ID] = true
		p.await(p.stdout, `lock-123 .* opened +`+opened.Command.ID+`\n`)
	}
	p.signal(os.Interrupt)
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	empty(t, temp)
}

// firstWrite calls a function at the first write.
type firstWrite struct{ then func() }

func (w firstWrite) Write(b []byte) (int, error) {
	w.then()
	return len(b), nil
}

func TestDemoEndedBeforeTheDoorHasOpened(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	ctx, end := context.WithCancel(t.Context())
	err := run(ctx, []string{"openlock", "demo", "--http", "127.0.0.1:0"}, firstWrite{end}, io.Discard)
	if err == nil || err.Error() != "the demo was ended before the door had opened" {
		t.Errorf("it says %v", err)
	}
	empty(t, temp)
}

func TestDemoOnAPortInUse(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	p, temp := startDemo(t, "--http", taken.Addr().String())
	if code := p.exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	want := "openlock: " + taken.Addr().String() + " is in use: stop what listens there, or choose another address with --http\n"
	if said := p.stderr.String(); said != want || strings.Contains(p.stdout.String(), "OpenLock") {
		t.Errorf("want %q", want)
	}
	empty(t, temp)
}
