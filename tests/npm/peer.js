// An independent DICOM stack (dcmjs-dimse) as a peer of the tests.
//
//   node peer.js scp PORT FOLDER                  storage SCP; writes what it gets, until it is ended
//   node peer.js echo HOST PORT CALLING CALLED
//   node peer.js store HOST PORT CALLING CALLED FILE...
//   node peer.js find HOST PORT CALLING CALLED LEVEL JSON
//   node peer.js move HOST PORT CALLING CALLED TARGET STUDY
//   node peer.js get HOST PORT CALLING CALLED STUDY FOLDER
//
// A verb prints one JSON object with every final and pending status; it exits 1 on a fault.
'use strict';

const fs = require('fs');
const path = require('path');
const { Writable } = require('stream');
const dimse = require('dcmjs-dimse');

const { Client, Scp, Server } = dimse;
const { CEchoRequest, CFindRequest, CGetRequest, CMoveRequest, CStoreRequest } = dimse.requests;
const { CEchoResponse, CStoreResponse } = dimse.responses;
const { PresentationContextResult, Status } = dimse.constants;

dimse.log.setLevel('silent');

/** Takes every presentation context with the first transfer syntax that is proposed. */
class Archive extends Scp {
  constructor(socket, options) {
    super(socket, options);
    this.folder = options.customOptions.folder;
  }

  associationRequested(association) {
    this.association = association;
    for (const { id } of association.getPresentationContexts()) {
      const context = association.getPresentationContext(id);
      context.setResult(PresentationContextResult.Accept, context.getTransferSyntaxUids()[0]);
    }
    this.sendAssociationAccept();
  }

  cEchoRequest(request, callback) {
    const response = CEchoResponse.fromRequest(request);
    response.setStatus(Status.Success);
    callback(response);
  }

  // The data set is kept as it came over the wire: parsing it here would hide what was sent.
  createStoreWritableStream(context, request) {
    const parts = [];
    const stream = new Writable({
      write(chunk, encoding, done) {
        parts.push(Buffer.from(chunk));
        done();
      },
    });
    stream.parts = parts;
    return stream;
  }

  createDatasetFromStoreWritableStream(stream, context, callback) {
    callback({ bytes: Buffer.concat(stream.parts), syntax: context.getAcceptedTransferSyntaxUid() });
  }

  cStoreRequest(request, callback) {
    const { bytes, syntax } = request.getDataset();
    const uid = request.getAffectedSopInstanceUid();
    const facts = { uid, sopClass: request.getAffectedSopClassUid(), syntax };
    fs.writeFileSync(path.join(this.folder, `${uid}.dataset`), bytes);
    fs.appendFileSync(path.join(this.folder, 'arrivals.jsonl'), `${JSON.stringify(facts)}\n`);
    const response = CStoreResponse.fromRequest(request);
    response.setStatus(Status.Success);
    callback(response);
  }

  associationReleaseRequested() {
    this.sendAssociationReleaseResponse();
  }
}

function counts(response) {
  return {
    status: response.getStatus(),
    remaining: response.getRemaining(),
    completed: response.getCompleted(),
    warnings: response.getWarnings(),
    failures: response.getFailures(),
  };
}

/** Sends the requests on one association; `found` is printed when it is closed. */
function run(client, [host, port, calling, called], found) {
  const fail = (what) => {
    process.stderr.write(`${what}\n`);
    process.exitCode = 1;
  };
  client.on('networkError', (error) => fail(`network: ${error.message}`));
  client.on('associationRejected', (reject) => fail(`rejected: ${JSON.stringify(reject)}`));
  client.on('closed', () => process.stdout.write(`${JSON.stringify(found)}\n`));
  client.send(host, Number(port), calling, called);
}

function echo(where) {
  const found = {};
  const request = new CEchoRequest();
  request.on('response', (response) => (found.status = response.getStatus()));
  const client = new Client();
  client.addRequest(request);
  run(client, where, found);
}

function store(where, files) {
  const found = { statuses: [] };
  const client = new Client();
  for (const file of files) {
    const request = new CStoreRequest(file);
    request.on('response', (response) => found.statuses.push(response.getStatus()));
    client.addRequest(request);
  }
  run(client, where, found);
}

function find(where, [level, keys]) {
  const found = { statuses: [], answers: [] };
  const make = { STUDY: 'createStudyFindRequest', SERIES: 'createSeriesFindRequest', IMAGE: 'createImageFindRequest' };
  const request = CFindRequest[make[level]](JSON.parse(keys));
  request.on('response', (response) => {
    found.statuses.push(response.getStatus());
    if (response.hasDataset()) found.answers.push(response.getDataset().getElements());
  });
  const client = new Client();
  client.addRequest(request);
  run(client, where, found);
}

function move(where, [target, study]) {
  const found = { responses: [] };
  const request = CMoveRequest.createStudyMoveRequest(target, study);
  request.on('response', (response) => found.responses.push(counts(response)));
  const client = new Client();
  client.addRequest(request);
  run(client, where, found);
}

function get(where, [study, folder]) {
  const found = { responses: [], stored: [] };
  const request = CGetRequest.createStudyGetRequest(study);
  request.on('response', (response) => found.responses.push(counts(response)));
  const client = new Client();
  client.on('cStoreRequest', (arrived, callback) => {
    const uid = arrived.getAffectedSopInstanceUid();
    arrived.getDataset().toFile(path.join(folder, `${uid}.dcm`));
    found.stored.push(uid);
    const response = CStoreResponse.fromRequest(arrived);
    response.setStatus(Status.Success);
    callback(response);
  });
  client.addRequest(request);
  run(client, where, found);
}

function scp([port, folder]) {
  const server = new Server(Archive);
  server.on('networkError', (error) => process.stderr.write(`${error.stack}\n`));
  server.listen(Number(port), { customOptions: { folder } });
  process.on('SIGTERM', () => process.exit(0));
}

const [verb, ...rest] = process.argv.slice(2);
const verbs = { echo, store, find, move, get };
if (verb === 'scp') {
  scp(rest);
} else if (verbs[verb]) {
  verbs[verb](rest.slice(0, 4), rest.slice(4));
} else {
  process.stderr.write('peer.js: see the top of the file for its verbs\n');
  process.exitCode = 2;
}
