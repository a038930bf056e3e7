package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

var built struct {
	once sync.Once
	dir  string
	err  error
	out  []byte
}

// binary builds the program once and returns its path. The folder is readable by
// every user, so that a test may run the program as another one.
func binary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "openlock-binary-"); built.err != nil {
			return
		}
		if built.err = os.Chmod(built.dir, 0o755); built.err != nil {
			return
		}
		built.out, built.err = exec.Command("go", "build", "-o", filepath.Join(built.dir, "openlock"), ".").CombinedOutput()
	})
	if built.err != nil {
		t.Fatalf("go build: %v\n%s", built.err, built.out)
	}
	return filepath.Join(built.dir, "openlock")
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// program is a process under way and what it has said so far.
type program struct {
	t              testing.TB
	cmd            *exec.Cmd
	stdout, stderr *output
	ended          chan struct{}
}

func launch(t testing.TB, cmd *exec.Cmd) *program {
	t.Helper()
	p := &program{t: t, cmd: cmd, stdout: newOutput(), stderr: newOutput(), ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = p.stdout, p.stderr, patience
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait() // exit tells the code
		close(p.ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("%s\nstdout: %s\nstderr: %s", strings.Join(cmd.Args, " "), p.stdout, p.stderr)
		}
	})
	return p
}

// exit waits for the end and answers with the exit code, -1 after a signal.
func (p *program) exit() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatalf("%s has not ended within %s", p.cmd.Args[0], patience)
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *program) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// await waits until a pattern is found in what the program has said, and
// answers with its groups.
func (p *program) await(o *output, pattern string) []string {
	p.t.Helper()
	find := regexp.MustCompile(pattern)
	timeout := time.After(patience)
	for ended := false; ; {
		text, more := o.now()
		if m := find.FindStringSubmatch(text); m != nil {
			return m
		}
		if ended {
			p.t.Fatalf("%s ended and has not said %s", p.cmd.Args[0], pattern)
		}
		select {
		case <-more:
		case <-p.ended: // all it said is here now
			ended = true
		case <-timeout:
			p.t.Fatalf("%s has not said %s within %s", p.cmd.Args[0], pattern, patience)
		}
	}
}

// output keeps what is written and tells who waits for more.
type output struct {
	mu   sync.Mutex
	text []byte
	more chan struct{}
}

func newOutput() *output { return &output{more: make(chan struct{})} }

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, b...)
	close(o.more)
	o.more = make(chan struct{})
	return len(b), nil
}

func (o *output) now() (text string, more <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text), o.more
}

func (o *output) String() string {
	text, _ := o.now()
	return text
}
