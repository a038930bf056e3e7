package main

import (
	"bytes"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/openlock/openlock/internal/contract/contracttest"
	"github.com/openlock/openlock/internal/device"
)

// snippet is one of the five on the reference page, which integrators have
// copied, and what runs it.
type snippet struct {
	name    string
	first   string // the beginning of its first line
	program string // that it is written for
	install string // the package that brings it
	file    string
	run     []string // before the file
	shows   string   // %s stands for the command's id
}

// answeredID is the command's id, however a language prints a map.
const answeredID = `['"]?command['"]?[:=>\s]+\{\s*['"]?id['"]?[:=>\s]+['"]%s['"]`

var snippets = []snippet{
	{"curl", "curl -X POST", "curl", "curl", "snippet.sh", []string{"sh"}, answeredID},
	{"Python", "import requests", "python3", "python3 python3-requests", "snippet.py", []string{"python3"}, answeredID},
	{"JavaScript", "const response = await fetch", "node", "nodejs", "snippet.mjs", []string{"node"}, answeredID},
	{"Go", "package main", "go", "golang", "snippet.go", []string{"go", "run"}, `^Response Status: 200 OK\n$`},
	{"Ruby", "require 'net/http'", "ruby", "ruby", "snippet.rb", []string{"ruby"}, answeredID},
}

// afterSnippets is how the page goes on: with an answer.
const afterSnippets = "{\n\"success\": true"

// text is the snippet as it stands on the page: to the next one.
func (s snippet) text(t *testing.T) string {
	t.Helper()
	page := "\n" + contracttest.Reference
	start := strings.Index(page, "\n"+s.first)
	end := len(page)
	next := []string{afterSnippets}
	for _, other := range snippets {
		next = append(next, other.first)
	}
	for _, n := range next {
		if i := strings.Index(page, "\n"+n); i > start {
			end = min(end, i)
		}
	}
	if start < 0 || end == len(page) {
		t.Fatalf("the %s snippet is not on the reference page", s.name)
	}
	return page[start+1 : end+1]
}

// filledIn is the snippet with what its reader has to put in, and nothing else
// changed: the host and the two credentials.
func (s snippet) filledIn(t *testing.T, host string, c creds) string {
	t.Helper()
	text := s.text(t)
	changes := [][2]string{{"api.spkey.co", host}, {"YOUR_API_TOKEN (JWT)", c.token}, {"YOUR_API_KEY", c.key}}
	if s.name == "Go" { // it does not compile with an import that it does not use
		changes = append(changes, [2]string{"\"encoding/json\"\n", ""})
	}
	for _, change := range changes {
		if n := strings.Count(text, change[0]); n != 1 {
			t.Fatalf("%q is in the %s snippet %d times", change[0], s.name, n)
		}
		text = strings.Replace(text, change[0], change[1], 1)
	}
	return text
}

// output runs the snippet in a folder of its own. That it trusts the server
// comes from the environment alone.
func (s snippet) output(t *testing.T, text, ca string) string {
	t.Helper()
	if _, err := exec.LookPath(s.program); err != nil {
		t.Fatalf("%s is not installed (%v): apt-get install %s, or make test, which does so", s.program, err, s.install)
	}
	dir := t.TempDir()
	for name, content := range map[string]string{s.file: text, "go.mod": "module snippet\n\ngo 1.21\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), s.run[0], append(s.run[1:len(s.run):len(s.run)], s.file)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(),
		"CURL_CA_BUNDLE="+ca, "REQUESTS_CA_BUNDLE="+ca, "NODE_EXTRA_CA_CERTS="+ca, "SSL_CERT_FILE="+ca,
		"GOFLAGS=", "GOWORK=off", "GOTOOLCHAIN=local",
		"NO_PROXY=localhost", "no_proxy=localhost")
	var stdout, stderr bytes.Buffer // node may warn on stderr
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v (it needs: apt-get install %s, which make test does)\n%s\n%s", s.program, err, s.install, &stdout, &stderr)
	}
	return stdout.String()
}

func TestTheSnippetsOfTheReferencePageOpenADoor(t *testing.T) {
	r := newRig(t, func(c *config) {
		c.http = ":0" // localhost is ::1 to some clients
		c.tlsCert, c.tlsKey = filepath.Join(c.data, "pki", "server.crt"), filepath.Join(c.data, "pki", "server.key")
	})
	ca, err := r.ca()
	if err != nil {
		t.Fatal(err)
	}
	r.client.Transport = r.contract.Transport(&http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"},
	})
	acme := r.org("acme")
	r.createLock(123, acme)
	d := r.device(123)
	_, port, err := net.SplitHostPort(r.http.Addr().String())
	if err != nil {
		t.Fatal(err)
	}

	for _, s := range snippets {
		t.Run(s.name, func(t *testing.T) {
			r, d := *r, *d
			r.t, d.t = t, t     // one language may fail without the others
			_, user := r.user() // all snippets send the same requestId
			said := s.output(t, s.filledIn(t, "localhost:"+port, creds{key: acme.key, token: user.token}), ca.CertFile())
			t.Logf("it has shown:\n%s", said)
			id := d.await(device.Opened).CommandID
			if !regexp.MustCompile(strings.ReplaceAll(s.shows, "%s", id)).MatchString(said) {
				t.Errorf("the device has opened for %s, which was not shown", id)
			}
			if end := r.outcome(acme, 123, id); end.get("outcome") != "opened" {
				t.Errorf("outcome %s", end.raw)
			}
		})
	}
	if n := d.openings(); n != 0 {
		t.Errorf("the door moved %d times more", n)
	}
}
