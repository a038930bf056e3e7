package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/openlock/openlock/internal/device"
)

// quotedTime is a time in a body.
var quotedTime = regexp.MustCompile(`"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"`)

// wantEvent holds a command's answer for lock 1. data is the event's, beside
// lockId, uuid and timestamp; no event is wanted without a kind.
func (r *rig) wantEvent(a reply, status int, version float64, kind, data string) {
	r.t.Helper()
	r.want(a, status)
	if a.get("success") != true || a.get("aggregateId") != "1" || a.get("version") != version {
		r.t.Errorf("want version %v: %s", version, a.raw)
	}
	if kind == "" {
		if v, there := a.body["event"]; v != nil || !there {
			r.t.Errorf("want no event: %s", a.raw)
		}
		return
	}
	got, _ := a.get("event", "data").(map[string]any)
	if a.get("event", "type") != kind || got["lockId"] != 1.0 || got["uuid"] != "u" || !wireTime.MatchString(fmt.Sprint(got["timestamp"])) {
		r.t.Errorf("want %s: %s", kind, a.raw)
	}
	got = maps.Clone(got)
	for _, common := range []string{"lockId", "uuid", "timestamp"} {
		delete(got, common)
	}
	var want map[string]any
	r.must(json.Unmarshal([]byte(data), &want))
	if fmt.Sprint(got) != fmt.Sprint(want) {
		r.t.Errorf("%s: data is %v, want %v", kind, got, want)
	}
}

func TestEachCommandAnswersWithItsEventOrWithNone(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.org("beta")
	const created = `{"serialNumber":"SN:1","keys":[{"uuid":"k0","indexNumber":0,"userId":"x"},{"uuid":"k1"}],"ownerId":"o","thingName":"lock-1","thingArn":"arn:aws:iot:local:000000000000:thing/lock-1"}`
	version := 0.0
	for _, c := range []struct {
		command, body string
		event, data   string // none when nothing changes
	}{
		{"CreateLock", `{"index":1,"uuid":"u","serialNumber":"SN:1","vendorName":"V","ownerId":"o","keys":[{"uuid":"k0","indexNumber":0,"userId":"x"},{"uuid":"k1"}]}`, "LockCreated", created},
		{"CreateLock", `{"index":1,"uuid":"u"}`, "", ``},
		{"CreateLock", `{"index":1,"uuid":"other","ownerId":"thief"}`, "", ``},
		{"SetOwner", `{"userId":"o"}`, "", ``},
		{"SetOwner", `{"userId":"p"}`, "OwnerSet", `{"userId":"p"}`},
		{"SetOwner", `{"userId":"p"}`, "", ``},
		{"SetOrganization", `{"orgId":"acme"}`, "", ``},
		{"AddKey", `{"keyUuid":"k1"}`, "", ``},
		{"AddKey", `{"keyUuid":"k0","keyIndexNumber":0,"userId":"x"}`, "", ``},
		{"AddKey", `{"keyUuid":"k1","keyIndexNumber":-5}`, "KeyAdded", `{"keyUuid":"k1","keyIndexNumber":-5}`},
		{"AddKey", `{"keyUuid":"k2","keyIndexNumber":2,"userId":"y"}`, "KeyAdded", `{"keyUuid":"k2","keyIndexNumber":2,"userId":"y"}`},
		{"AddKey", `{"keyUuid":"k2","keyIndexNumber":2,"userId":"z"}`, "KeyAdded", `{"keyUuid":"k2","keyIndexNumber":2,"userId":"z"}`},
		{"RemoveKey", `{"keyUuid":"k0"}`, "KeyRemoved", `{"keyUuid":"k0","keyIndexNumber":0}`},
		{"AddKey", `{"keyUuid":"k3","keyIndexNumber":0}`, "KeyAdded", `{"keyUuid":"k3","keyIndexNumber":0}`}, // its number is free again
		{"RemoveKey", `{"keyIndexNumber":2}`, "KeyRemoved", `{"keyUuid":"k2","keyIndexNumber":2}`},
		{"RemoveKey", `{"keyUuid":"k3","keyIndexNumber":0}`, "KeyRemoved", `{"keyUuid":"k3","keyIndexNumber":0}`},
		{"SetOrganization", `{"orgId":"beta"}`, "OrganizationSet", `{"orgId":"beta"}`},
	} {
		status := http.StatusOK
		if version == 0 {
			status = http.StatusCreated
		}
		if c.event != "" {
			version++
		}
		r.wantEvent(r.send("POST", "/locks/1/"+c.command, acme, c.body), status, version, c.event, c.data)
	}
	checkState(t, r.db, 1, everything(t, r.db, 1))
}

func TestWhatIsReadOfALock(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.want(r.send("POST", "/locks/1/CreateLock", acme, `{"index":1,"uuid":"u","serialNumber":"SN","ownerId":"o","keys":[{"uuid":"k","indexNumber":3,"userId":"x"}]}`), http.StatusCreated)
	r.want(r.send("POST", "/locks/1/AddKey", acme, `{"keyUuid":"l"}`), http.StatusOK)
	r.want(r.send("POST", "/locks/2/CreateLock", r.super(), `{"index":2,"uuid":"bare"}`), http.StatusCreated)
	for _, c := range []struct {
		path, want string
		by         creds
	}{
		{"/locks/1/basic-info", `{"id":"1","lockId":1,"uuid":"u","version":2,"serialNumber":"SN","ownerId":"o","orgId":"acme","organizationId":"acme","r2Prefix":"events/lock/1/"}`, acme},
		{"/locks/1/details", `{"id":"1","lockId":1,"uuid":"u","serialNumber":"SN","keys":[{"uuid":"k","indexNumber":3,"userId":"x"},{"uuid":"l"}],"ownerId":"o","organizationId":"acme","residents":[],"orgId":"acme","version":2,"timestamp":"T","r2Prefix":"events/lock/1/"}`, acme},
		{"/locks/2/basic-info", `{"id":"2","lockId":2,"uuid":"bare","version":1,"r2Prefix":"events/lock/2/"}`, r.super()},
		{"/locks/2/details", `{"id":"2","lockId":2,"uuid":"bare","keys":[],"residents":[],"orgId":"","version":1,"timestamp":"T","r2Prefix":"events/lock/2/"}`, r.super()},
	} {
		a := r.want(r.send("GET", c.path, c.by, nil), http.StatusOK)
		if got := quotedTime.ReplaceAllString(a.raw, `"T"`); got != c.want {
			t.Errorf("%s is\n%s, want\n%s", c.path, got, c.want)
		}
		if a.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s may be kept: %v", c.path, a.header)
		}
	}
	if a := r.send("GET", "/locks/2/events", r.super(), nil); a.get("events").([]any)[0].(map[string]any)["orgId"] != "" {
		t.Errorf("orgId must be there and empty when unset: %s", a.raw)
	}
}

func TestEventsArePagedFromOneAndTheLastIsTheDefault(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	for version := 1; version <= 31; version++ {
		pages := (version + 9) / 10
		for _, page := range []int{0, 1, pages, pages + 1, pages + 1000} { // 0: none asked for
			if version%10 > 1 && version != 5 {
				continue // around full pages is where it can go wrong
			}
			r.checkPage(acme, version, page)
		}
		r.want(r.send("POST", "/locks/1/AddKey", acme, fmt.Sprintf(`{"keyUuid":"k%d"}`, version)), http.StatusOK)
	}
}

// checkPage holds a page of events of a lock at a version.
func (r *rig) checkPage(c creds, version, page int) {
	r.t.Helper()
	path, pages := "/locks/1/events", (version+9)/10
	if page != 0 {
		path += fmt.Sprintf("?page=%d", page)
	} else {
		page = pages
	}
	a := r.want(r.send("GET", path, c, nil), http.StatusOK)
	if a.get("aggregateId") != "1" || a.get("totalEvents") != float64(version) || a.get("page") != float64(page) ||
		a.get("pageSize") != 10.0 || a.get("totalPages") != float64(pages) {
		r.t.Errorf("%d events, %s: %s", version, path, a.raw)
	}
	events := a.get("events").([]any)
	if want := max(0, min(10, version-(page-1)*10)); len(events) != want {
		r.t.Fatalf("%d events, %s: has %d, want %d", version, path, len(events), want)
	}
	for i, e := range events {
		e := e.(map[string]any)
		kind := "KeyAdded"
		if v := (page-1)*10 + i + 1; e["version"] != float64(v) {
			r.t.Errorf("%d events, %s: version %v at place %d", version, path, e["version"], v)
		} else if v == 1 {
			kind = "LockCreated"
		}
		_, object := e["doId"]
		if e["aggregateType"] != "Lock" || e["aggregateId"] != "1" || e["orgId"] != "acme" || e["type"] != kind || e["actor"] != "org:acme" ||
			!wireTime.MatchString(e["timestamp"].(string)) || e["event"].(map[string]any)["lockId"] != 1.0 || object {
			r.t.Errorf("event %v", e)
		}
	}
}

func TestCommandsAreListedNewestFirst(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	r.createLock(1, acme)
	var ids []string
	for range 51 {
		ids = append(ids, r.send("POST", openPath(1), acme, nil).get("command", "id").(string))
	}
	slices.Reverse(ids)
	listed := func(query string) (got []string, next any) {
		a := r.want(r.send("GET", "/locks/1/commands"+query, acme, nil), http.StatusOK)
		for _, c := range a.get("commands").([]any) {
			c := c.(map[string]any)
			got = append(got, c["id"].(string))
			if c["lockId"] != 1.0 || c["outcome"] != "failed" || c["reason"] != "offline" || c["confirmedBy"] != "nobody" || c["delivered"] != "no" ||
				!wireTime.MatchString(c["issuedAt"].(string)) || !wireTime.MatchString(c["expiresAt"].(string)) {
				t.Errorf("command %v", c)
			}
		}
		return got, a.get("next")
	}
	got, next := listed("")
	if !slices.Equal(got, ids[:50]) || next != ids[49] {
		t.Errorf("first page %v, next %v", got, next)
	}
	if got, next = listed("?before=" + ids[49]); !slices.Equal(got, ids[50:]) || next != nil {
		t.Errorf("last page %v, next %v", got, next)
	}
	if got, _ = listed("?before=" + ids[50]); len(got) != 0 {
		t.Errorf("before the first there are %v", got)
	}
}

// Every success that the contract documents of a served route is exercised, and
// so held against its schema.
func TestEveryDocumentedSuccessIsSeen(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	d := r.device(1)
	lock1 := func(call string, body string) reply { return r.send("POST", "/locks/1/"+call, acme, body) }
	lock1("CreateLock", `{"index":1,"uuid":"u","keys":[{"uuid":"k","indexNumber":1,"userId":"x"}],"serialNumber":"s","ownerId":"o"}`)
	lock1("CreateLock", `{"index":1,"uuid":"u"}`)
	lock1("SetOwner", `{"userId":"o2"}`)
	lock1("AddKey", `{"keyUuid":"l","keyIndexNumber":2,"userId":"y"}`)
	lock1("RemoveKey", `{"keyIndexNumber":2}`)
	lock1("SetOrganization", `{"orgId":"acme"}`)
	opened := r.want(r.send("POST", openPath(1), acme, `{"requestId":"r","reason":"x"}`, "Prefer", "wait=20"), http.StatusOK)
	if d.await(device.Opened).CommandID != opened.get("command", "id") || opened.get("command", "outcome") != "opened" {
		t.Errorf("answer %s", opened.raw)
	}
	for _, read := range []string{"basic-info", "details", "events"} {
		r.send("GET", "/locks/1/"+read, acme, nil)
	}
	seen, served := r.contract.Seen(), servedRoutes(t)
	for a, statuses := range documentedRoutes(t) {
		if _, ok := served[a]; !ok {
			continue
		}
		for _, status := range statuses {
			if seen[a.String()+" "+status] == 0 {
				t.Errorf("%s never answered %s; seen %v", a, status, seen)
			}
		}
	}
	checkState(t, r.db, 1, everything(t, r.db, 1))
}

func TestTheStateBesideTheLogIsItsFold(t *testing.T) {
	r := discreetRig(t)
	acme, beta := r.org("acme"), r.org("beta")
	r.createLock(1, acme)
	r.send("POST", openPath(1), acme, `{"reason":"nobody is there"}`)
	d := r.device(1, func(c *device.Config) { c.Faults.LowBattery = true })
	for i := range 3 {
		r.want(r.send("POST", openPath(1), acme, `{"requestId":"r"}`, "Prefer", "wait=20"), http.StatusOK)
		r.want(r.send("POST", "/locks/1/AddKey", acme, fmt.Sprintf(`{"keyUuid":"k","userId":"%d"}`, i)), http.StatusOK)
		checkState(t, r.db, 1, everything(t, r.db, 1))
	}
	d.stop()
	r.want(r.send("POST", "/locks/1/SetOrganization", acme, `{"orgId":"beta"}`), http.StatusOK)
	r.want(r.send("POST", "/locks/1/SetOwner", beta, `{"userId":"o"}`), http.StatusOK)
	r.want(r.send("POST", "/locks/1/RemoveKey", beta, `{"keyUuid":"k"}`), http.StatusOK)
	audit(t, r.db, 1)
	before := r.send("GET", "/locks/1/details", beta, nil)
	r.restart()
	if after := r.send("GET", "/locks/1/details", beta, nil); after.raw != before.raw || !strings.Contains(after.raw, `"ownerId":"o"`) {
		t.Errorf("before the restart\n%s\nafter it\n%s", before.raw, after.raw)
	}
}
